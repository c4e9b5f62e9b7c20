#!/usr/bin/env bash
# Without a GIL: the whole suite on a free-threaded interpreter, and the tests of threads under ThreadSanitizer.
#
#   tests/free_threaded/run.sh [suite] [races]     both, if neither is named
#
# The tool sees only what was compiled for it. An interpreter that was not hides the locks of its lists and dicts
# from it, so that handing an object over looks like a race (tests/README.md): races has one of its own.
#
# An interpreter that is not at hand is built from Debian's source package, which needs no root, and kept:
#   FREE_THREADED_PYTHON         the interpreter of the suite; else a python3.1Xt on PATH or of pyenv
#   FREE_THREADED_TSAN_PYTHON    the interpreter of the races, built --with-thread-sanitizer
#   FREE_THREADED_VERSION        which one to build (3.13)
#   FREE_THREADED_SECONDS        how long each build may take (3600); one that is cut short goes on the next time
#   GUESTMEM_CACHE               where they are kept (~/.cache/guestmem)
#
# What cannot be run is a line SKIPPED with the reason, as pytest writes it, and no failure.
set -euo pipefail
exec </dev/null

version=${FREE_THREADED_VERSION:-3.13}
seconds=${FREE_THREADED_SECONDS:-3600}
cache=${GUESTMEM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/guestmem}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$(dirname "$here")")
work=$(mktemp -d "${TMPDIR:-/tmp}/guestmem-ft.XXXXXX")
trap 'rm -rf "$work"' EXIT

export PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore
# With PYTHON_GIL=0 nobody would notice a module that wants the GIL back.
unset PYTHON_GIL CFLAGS LDFLAGS VIRTUAL_ENV

skip() { printf 'SKIPPED [1] tests/free_threaded: %s\n' "$*"; }

# --- the interpreters ---

is_free_threaded() {
    "$1" -c 'import ensurepip, ssl, sys, sysconfig, venv
sys.exit(sysconfig.get_config_var("Py_GIL_DISABLED") != 1)' 2>/dev/null
}

is_instrumented() {
    is_free_threaded "$1" && "$1" -c 'import sys, sysconfig
sys.exit("--with-thread-sanitizer" not in sysconfig.get_config_var("CONFIG_ARGS"))'
}

# Says what is missing for a build, if something is.
missing() {
    local name header
    for name in apt-get gcc make tar xz; do
        command -v "$name" >/dev/null || { echo "there is no $name"; return; }
    done
    for header in zlib.h openssl/ssl.h ffi.h; do  # for pip, and for ctypes
        gcc -E -include "$header" -x c /dev/null >/dev/null 2>&1 ||
            { echo "the header $header is missing (zlib1g-dev, libssl-dev, libffi-dev)"; return; }
    done
}

# The sources of Debian's package, in $cache/source/$version; lists and keys are kept apart from the system's.
source_package() {
    local dir=$cache/apt options
    [[ -x $cache/source/$version/configure ]] && return
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$cache/source"
    options=(-o "Dir::Etc::sourcelist=$dir/list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$dir/lists"
        -o "Dir::Cache=$dir/cache" -o APT::Sandbox::User="$(id -un)" -o Acquire::Check-Valid-Until=false)
    echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian forky main" \
        >"$dir/list"
    apt-get "${options[@]}" update -qq || return
    (cd "$dir" && apt-get "${options[@]}" source -qq --download-only "python$version") || return
    rm -rf "$cache/source/partial"
    mkdir "$cache/source/partial"
    tar -xJf "$dir/python$version"_*.orig.tar.xz -C "$cache/source/partial" --strip-components=1 || return
    mv "$cache/source/partial" "$cache/source/$version"
}

# build NAME OPTION...: an interpreter in $cache/NAME.
build() {
    local name=$1 tree=$cache/build/$1
    shift
    mkdir -p "$tree"
    cd "$tree"
    # What the sanitizer says while Python builds itself is no concern of ours.
    export TSAN_OPTIONS=report_bugs=0:exitcode=0
    [[ -e Makefile ]] ||
        "$cache/source/$version/configure" -q --disable-gil --disable-test-modules --prefix="$cache/$name" "$@" || return
    make -s -j"$(nproc)" || return
    make -s install || return
    cp "$cache/source/$version"/Tools/tsan/*.txt "$cache/$name/" || return
    rm -rf "$tree"
}

build_once() { [[ -e $cache/$1/suppressions.txt ]] || { source_package && build "$@"; }; }

# built NAME OPTION...: prints the interpreter of that name in the cache, which is built if need be.
built() {
    local what
    if [[ ! -e $cache/$1/suppressions.txt ]]; then
        what=$(missing)
        [[ -z $what ]] || { echo "it is not installed and cannot be built: $what" >&2; return 1; }
        mkdir -p "$cache"
        export -f source_package build build_once
        export cache version
        # One builds, others wait for it.
        if ! timeout --kill-after=10 "$seconds" flock "$cache/lock" bash -c 'build_once "$@"' _ "$@" >"$cache/$1.log" 2>&1; then
            echo "it is not installed and was not built in $seconds s: $(tail -n 1 "$cache/$1.log")" >&2
            return 1
        fi
    fi
    echo "$cache/$1/bin/python$version"
}

find_plain() {
    local python
    for python in "${FREE_THREADED_PYTHON:-}" python3.15t python3.14t python3.13t \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*t/bin/python3; do
        if [[ -n $python ]] && is_free_threaded "$python"; then
            command -v "$python"
            return
        fi
    done
    built "python$version"
}

find_instrumented() {
    local python=${FREE_THREADED_TSAN_PYTHON:-}
    if [[ -n $python ]] && is_instrumented "$python"; then
        command -v "$python"
        return
    fi
    built "python$version-tsan" --with-thread-sanitizer
}

# --- the runs ---

# installed NAME PYTHON: the package with what its tests need, in $work/NAME, from sources in $work/NAME/sources, where
# it leaves us. Builds of two kinds share no directory.
installed() {
    "$2" -m venv "$work/$1"
    mkdir "$work/$1/sources"
    cd "$root"
    cp -R csrc src tests pyproject.toml setup.py README.md LICENSE MANIFEST.in "$work/$1/sources"
    cd "$work/$1/sources"
    # Newer ones may have no wheel for this interpreter.
    "$work/$1/bin/pip" install -qq --only-binary hypothesis,numpy '.[test]'
}

# The plugin no_gil fails a run that begins or ends with a GIL.
tests() {
    PYTHONPATH=$here "$1" -m pytest -q -ra -p no:cacheprovider --color=no -p no_gil "${@:2}"
}

suite() {
    local python
    python=$(find_plain 2>"$work/why") || { skip "the suite without a GIL: $(cat "$work/why")"; return 0; }
    "$python" -VV
    installed suite "$python"
    tests "$work/suite/bin/python"
}

# Reports go to files, so that one from a child process counts too. First a planted race: it must be seen. Without
# test_interpreters.py: CPython 3.13 races with itself where two threads make interpreters.
races() {
    local python reports=$work/reports flags="-fsanitize=thread -fno-omit-frame-pointer -O1 -g -U_FORTIFY_SOURCE"
    python=$(find_instrumented 2>"$work/why") || { skip "races under ThreadSanitizer: $(cat "$work/why")"; return 0; }
    "$python" -VV
    export TSAN_OPTIONS=report_bugs=0:exitcode=0
    CFLAGS=$flags LDFLAGS=-fsanitize=thread installed races "$python"

    mkdir "$reports"
    export TSAN_OPTIONS="exitcode=0:die_after_fork=0:history_size=7:log_path=$reports/tsan:suppressions=$work/suppressions"
    cat "${python%/bin/*}/suppressions_free_threading.txt" "$here/suppressions.txt" >"$work/suppressions"
    gcc -fsanitize=thread -g -shared -fPIC -o "$work/planted.so" "$here/planted.c"
    "$work/races/bin/python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1]).planted_race()' "$work/planted.so"
    if ! grep -q 'data race .* in planted_writer' "$reports"/* 2>/dev/null; then
        echo "the planted race was not seen"
        return 1
    fi
    rm -f "$reports"/*

    GUESTMEM_RACE_SECONDS=${GUESTMEM_RACE_SECONDS:-2} tests "$work/races/bin/python" -m "not slow" \
        tests/test_{threads,guest_threads,atomic_threads,guest,migration,dirty,atomics,arrays,lifetime}.py \
        tests/test_{from_buffer,buffer_exports,with,processes,structs}.py
    if compgen -G "$reports/*" >/dev/null; then
        cat "$reports"/*
        echo "ThreadSanitizer has reported races:"
        sed -n 's/^SUMMARY: //p' "$reports"/* | sort | uniq -c
        return 1
    fi
}

wanted=("$@")
((${#wanted[@]})) || wanted=(suite races)
for name in "${wanted[@]}"; do
    [[ $name == suite || $name == races ]] || { echo "there are suite and races, not $name"; exit 2; }
done
for name in "${wanted[@]}"; do
    ("$name")
done
