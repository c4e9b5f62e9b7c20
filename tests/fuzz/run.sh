#!/usr/bin/env bash
# Fuzzes guestmem, built by clang with AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   tests/fuzz/run.sh [SECONDS [DIR]]     for 60 seconds, or as many as given; a finding fails
#   tests/fuzz/run.sh --merge DIR         keeps of the inputs in DIR those that reach something new
#
# DIR keeps the inputs that were found. PYTHON is an interpreter that atheris has a wheel for (3.11 to 3.13). It
# needs clang. Exit status 77: it cannot run here, and says why.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
unset CFLAGS LDFLAGS GUESTMEM_FULL_API
python=${PYTHON:-python3}
work=$(mktemp -d "${TMPDIR:-/tmp}/guestmem-fuzz.XXXXXX")
trap 'rm -rf "$work"' EXIT

cannot() { echo "cannot fuzz: $*"; exit 77; }

command -v clang >/dev/null || cannot "clang is not installed"
"$python" -m venv "$work/venv" || cannot "$python makes no virtual environment"
bin=$work/venv/bin
"$bin/pip" install -q --only-binary :all: -r "$here/requirements.txt" ||
    cannot "atheris has no wheel for $("$python" --version)"
runtime=$("$bin/python" -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so

# A copy, so that no build directory is shared.
mkdir "$work/source"
(cd "$root" && tar -c csrc src pyproject.toml setup.py README.md LICENSE MANIFEST.in) | tar -x -C "$work/source"
flags="-fsanitize=fuzzer-no-link,address,undefined"
# Not linked with them: what they need is in the runtime that is loaded first.
CC=clang LDSHARED="clang -shared" \
    CFLAGS="$flags -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g -U_FORTIFY_SOURCE" \
    "$bin/pip" install -q "$work/source"

# The interpreter leaks at exit. Bus errors are for guestmem to handle.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_sigbus=0
export UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1
cd "$work"
fuzz() { LD_PRELOAD=$runtime "$bin/python" -X faulthandler "$root/tests/fuzz" -max_len=400 -timeout=30 "$@"; }

if [[ ${1:-} == --merge ]]; then
    mkdir merged
    fuzz -set_cover_merge=1 -use_counters=0 merged "$2" "$here/corpus"
    rm -rf "$here/corpus"
    cp -r merged "$here/corpus"
else
    found=${2:-$work/found}
    mkdir -p "$found"
    fuzz -max_total_time="${1:-60}" -len_control=0 -rss_limit_mb=4096 -print_final_stats=1 -verbosity=1 \
        "$found" "$here/corpus"
fi
