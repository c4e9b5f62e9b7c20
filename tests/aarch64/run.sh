#!/usr/bin/env bash
# The suite on aarch64: compiled by a cross compiler, run by qemu's user mode.
#
#   tests/aarch64/run.sh [pytest's arguments]
#
# The interpreter and what it needs are Debian's packages for arm64, unpacked and not installed, so that no root is
# needed; they are kept in $GUESTMEM_CACHE (~/.cache/guestmem). The compiler is Debian's gcc-aarch64-linux-gnu.
#
# What cannot be run is a line SKIPPED with the reason, as pytest writes it, and no failure.
set -euo pipefail
exec </dev/null

cache=${GUESTMEM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/guestmem}/aarch64
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$(dirname "$here")")
work=$(mktemp -d "${TMPDIR:-/tmp}/guestmem-aarch64.XXXXXX")
trap 'rm -rf "$work"' EXIT

export PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore
unset CFLAGS LDFLAGS VIRTUAL_ENV

skip() {
    printf 'SKIPPED [1] tests/aarch64: %s\n' "$*"
    exit 0
}

for name in apt-get dpkg-deb; do
    command -v "$name" >/dev/null || skip "there is no $name"
done
command -v aarch64-linux-gnu-gcc >/dev/null || skip "there is no compiler for it (gcc-aarch64-linux-gnu)"

# packages NAME ARCHITECTURE PACKAGE...: Debian's packages, with all that they depend on, unpacked in $cache/NAME. apt's
# lists and its idea of what is installed (nothing) are kept apart from the system's.
packages() {
    local name=$1 architecture=$2 dir=$cache/apt-$1 options deb
    shift 2
    [[ -e $cache/$name ]] && return
    rm -rf "$dir"
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$dir/root"
    : >"$dir/status"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main" \
        >"$dir/list"
    options=(-o "Dir::Etc::sourcelist=$dir/list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$dir/lists"
        -o "Dir::State::status=$dir/status" -o "Dir::Cache=$dir/cache" -o APT::Sandbox::User="$(id -un)"
        -o "APT::Architecture=$architecture" -o "APT::Architectures=$architecture" -o Debug::NoLocking=1)
    apt-get "${options[@]}" update -qq &&
        apt-get "${options[@]}" install -qq --download-only --yes --no-install-recommends "$@" || return
    for deb in "$dir"/cache/archives/*.deb; do
        dpkg-deb -x "$deb" "$dir/root" || return
    done
    mv "$dir/root" "$cache/$name"
    rm -rf "$dir"
}

if ! qemu=$(command -v qemu-aarch64-static); then
    packages qemu "$(dpkg --print-architecture)" qemu-user-static >"$work/log" 2>&1 ||
        skip "no qemu-aarch64-static, and none to be had: $(tail -n 1 "$work/log")"
    qemu=$cache/qemu/usr/bin/qemu-aarch64-static
fi
sysroot=$cache/sysroot
packages sysroot arm64 python3-minimal libpython3.11-stdlib libpython3.11-dev libstdc++6 >"$work/log" 2>&1 ||
    skip "no Python for arm64 to be had: $(tail -n 1 "$work/log")"

# A virtual environment whose interpreter is this script. qemu tells Python the script's own name, so that
# sys.executable, by which tests start children, is the script again.
mkdir -p "$work/venv/bin"
printf 'home = %s\n' "$sysroot/usr/bin" >"$work/venv/pyvenv.cfg"
cat >"$work/venv/bin/python" <<END
#!/bin/sh
exec $qemu -0 "\$0" -L $sysroot $sysroot/usr/bin/python3.11 "\$@"
END
chmod +x "$work/venv/bin/python"

mkdir "$work/sources"
cd "$root"
cp -R csrc src tests pyproject.toml setup.py README.md LICENSE MANIFEST.in "$work/sources"
cd "$work/sources"
python3 -m venv "$work/pip"
# Debian's configuration names the cross compiler; only the headers are elsewhere.
C_INCLUDE_PATH=$sysroot/usr/include "$work/pip/bin/pip" --python "$work/venv/bin/python" \
    install -qq --only-binary hypothesis,numpy '.[test]'
"$work/venv/bin/python" -VV
PYTHONPATH=$here "$work/venv/bin/python" -m pytest -q -ra -p no:cacheprovider --color=no -p emulated -m "not slow" "$@"
