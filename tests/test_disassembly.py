"""What the compiler made of the accesses: one instruction for a scalar, no string instructions and
no libc in a copy. Read in the sources compiled alone, for both architectures, and watched in the
built module by the processor's own debug registers.
"""

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestmem import _native

ROOT = Path(__file__).resolve().parents[1]
MODULE = Path(_native.__file__)
PLAIN_ENV = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "CFLAGS", "LDFLAGS")}
MARKS = (b"__asan_", b"__tsan_", b"__ubsan_", b"__gcov_", b".gcda")
INSTRUMENTED = any(mark in MODULE.read_bytes() for mark in MARKS)
MACHINE = platform.machine()
GUARDED = pytest.mark.skipif(INSTRUMENTED, reason="a sanitizer's or coverage build")

# Pointers that are known to be aligned: what remains is the access alone.
SCALARS = """
#include "access.h"
#define SCALAR(N)                                                               \\
    uint64_t load_##N(const char *p) { return access_load(__builtin_assume_aligned(p, N), N); } \\
    void store_##N(char *p, uint64_t v) { access_store(__builtin_assume_aligned(p, N), v, N); }
SCALAR(1) SCALAR(2) SCALAR(4) SCALAR(8)
"""
# The one access of each width, after symbols, addresses and comments are gone.
EXPECTED = {
    "x86_64": {
        "load_1": r"movzb[lq] \(%rdi\),%[er]ax",
        "load_2": r"movzw[lq] \(%rdi\),%[er]ax",
        "load_4": r"mov \(%rdi\),%eax",
        "load_8": r"mov \(%rdi\),%rax",
        "store_1": r"mov %sil,\(%rdi\)",
        "store_2": r"mov %si,\(%rdi\)",
        "store_4": r"mov %esi,\(%rdi\)",
        "store_8": r"mov %rsi,\(%rdi\)",
    },
    "aarch64": {
        "load_1": r"ldrb w0, \[x0\]",
        "load_2": r"ldrh w0, \[x0\]",
        "load_4": r"ldr w0, \[x0\]",
        "load_8": r"ldr x0, \[x0\]",
        "store_1": r"strb w\d+, \[x0\]",
        "store_2": r"strh w\d+, \[x0\]",
        "store_4": r"str w1, \[x0\]",
        "store_8": r"str x1, \[x0\]",
    },
}
VECTORS = {  # the widest moves of a copy, aligned on the guest's side
    "x86_64": (r"vmovdqa \S*%ymm", r"mov(dqa|aps) \S*%xmm"),
    "aarch64": (r"ldr q\d+, ", r"str q\d+, "),
}


def run(*command: str) -> str:
    result = subprocess.run(
        command, cwd=ROOT, env=PLAIN_ENV, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def disassemble(objdump: str, path: Path) -> dict[str, list[str]]:
    """Return the instructions of each function, relocations among them."""
    functions: dict[str, list[str]] = {}
    name = ""
    for line in run(objdump, "-dr", "--no-show-raw-insn", str(path)).splitlines():
        if label := re.match(r"[0-9a-f]+ <(\S+)>:", line):
            name = label[1]
            functions[name] = []
        elif code := re.match(r"\s+[0-9a-f]+:\s+(.*)", line):
            functions[name].append(re.sub(r"\s+", " ", code[1]).strip())
    return functions


def flags(machine: str) -> list[str]:
    """Return the flags that setup.py builds with."""
    code = """
        import json, warnings
        warnings.simplefilter("ignore")
        import setuptools
        from distutils.core import run_setup
        (extension,) = run_setup("setup.py", stop_after="init").ext_modules
        print(json.dumps(extension.extra_compile_args))
    """
    found: list[str] = json.loads(run(sys.executable, "-c", textwrap.dedent(code)))
    if machine != MACHINE:
        drop = ("-fcf-protection", "-mbranch-protection")
        found = [flag for flag in found if not flag.startswith(drop)]
        found += ["-mbranch-protection=standard"] if machine == "aarch64" else ["-fcf-protection"]
    return found


@pytest.fixture(scope="module", params=["x86_64", "aarch64"])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, list[str]], dict[str, list[str]]]:
    """Compile the copies, and each access to a scalar as a function of its own."""
    machine: str = request.param
    prefix = "" if machine == MACHINE else f"{machine}-linux-gnu-"
    compiler, objdump = f"{prefix}gcc", f"{prefix}objdump"
    for tool in compiler, objdump:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian: gcc-{machine.replace('_', '-')}-linux-gnu)")
    work = tmp_path_factory.mktemp(machine)
    (work / "scalars.c").write_text(SCALARS)
    options = [*flags(machine), "-Werror", "-I", "csrc"]
    sources = "csrc/access.c", "csrc/access_wide.c", "csrc/access_atomic.c"
    for source in (str(work / "scalars.c"), *sources):
        target = str(work / Path(source).with_suffix(".o").name)
        run(compiler, *options, "-c", source, "-o", target)
    scalars, access, wide, atomic = (
        disassemble(objdump, work / f"{name}.o")
        for name in ("scalars", "access", "access_wide", "access_atomic")
    )
    return machine, scalars | atomic, access | wide


def test_a_scalar_is_one_instruction(
    compiled: tuple[str, dict[str, list[str]], dict[str, list[str]]],
) -> None:
    machine, scalars, _ = compiled
    for name, expected in EXPECTED[machine].items():
        codes = [re.sub(r" (#|//|<).*", "", code) for code in scalars[name]]
        memory = [code for code in codes if re.search(r"^(?!nop).*(\(%|\[)", code)]
        assert len(memory) == 1, (name, scalars[name])
        assert re.fullmatch(expected, memory[0]), (name, scalars[name])


ATOMICS = {  # what must be there for each width; aarch64 calls those of libgcc, which choose
    "x86_64": {
        "xadd": r"lock xadd %\S+,\(",
        "exchange": r"xchg %\S+,\(",
        "compare": r"lock cmpxchg %\S+,\(",
    },
    "aarch64": {
        "xadd": r"__aarch64_ldadd(\d)_acq_rel",
        "exchange": r"__aarch64_swp(\d)_acq_rel",
        "compare": r"__aarch64_cas(\d)_acq_rel",
    },
}


def test_atomics_are_real(
    compiled: tuple[str, dict[str, list[str]], dict[str, list[str]]],
) -> None:
    machine, functions, _ = compiled
    text = "\n".join(functions["access_atomic"])
    for name, pattern in ATOMICS[machine].items():
        found = re.findall(pattern, text)
        assert len(found) >= 4, (name, text)
        if machine == "aarch64":
            assert set(found) == set("1248"), (name, found)
    if machine == "aarch64":  # loads and stores that order
        for instruction in "ldar", "stlr":
            for suffix in "b", "h", "":
                assert re.search(rf"^{instruction}{suffix} ", text, re.MULTILINE), instruction


def assert_plain(functions: dict[str, list[str]]) -> None:
    """No string instruction, and no call but to the copies themselves."""
    for name, codes in functions.items():
        for code in codes:
            assert not re.search(r"\brep\w* |\b(cpy|set)[fpme]\w* \[", code), (name, code)
            assert not re.search(r"\b(mem(cpy|move|set)|bcopy|bzero)\b", code), (name, code)
            if name not in ("access_init", "wide_is_there") and re.match(
                r"(call|jmp|bl?|R_\S*(PLT|JUMP|CALL)\S*) ", code
            ):
                target = re.search(r"[< ]([A-Za-z_]\w*)[^ ]*$", code)
                assert target is not None, (name, code)
                assert target[1] in functions.keys() | {"__stack_chk_fail"}, (name, code)


def test_a_copy_is_its_own(
    compiled: tuple[str, dict[str, list[str]], dict[str, list[str]]],
) -> None:
    machine, _, access = compiled
    assert {"access_read", "access_write", "access_copy", "access_fill"} <= set(access)
    assert_plain(access)
    if machine == "aarch64":  # a pair may be two accesses or one: only the stack's are known
        pairs = [
            code for codes in access.values() for code in codes if re.match("(ld|st)n?p ", code)
        ]
        assert [code for code in pairs if "[sp" not in code] == []
    text = "\n".join(code for codes in access.values() for code in codes)
    for pattern in VECTORS[machine]:
        assert re.search(pattern, text), f"no {pattern}: the copies lost their vectors"


@GUARDED
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
def test_the_built_copies_are_the_same() -> None:
    built = disassemble("objdump", MODULE)
    copies = {name: codes for name, codes in built.items() if re.match("access_|wide_", name)}
    if not copies:
        pytest.skip("the built module is stripped of its symbols")
    assert_plain(copies)


# Watched: the processor stops the child after each access to 8 bytes of its guest memory.

CHILD = """
import ctypes, os, signal, sys
import guestmem
from guestmem import MemoryMapping
size = 48 << 20
if sys.argv[1] == "file":  # may fault, so each access is guarded
    fd = os.memfd_create("ram")
    os.ftruncate(fd, size)
    ram = MemoryMapping.from_fd(fd, size)
else:
    ram = MemoryMapping(size)
ram.fill(0x11)
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
if ptrace(0, 0, None, None) != 0:  # PTRACE_TRACEME
    sys.exit(os.strerror(ctypes.get_errno()))
print(ram.as_ptr() + 0x1000, flush=True)
calls = []
for name in "u8", "u16", "u32", "u64", "be32", "f64":
    type_ = getattr(guestmem, name)
    ref, value = ram.get_ref(0x1000, type_), 0x55
    calls += [(ref.load,), (ref.store, value)]
    calls += [(ram.read_obj, 0x1000, type_), (ram.write_obj, value, 0x1000, type_)]
for count in 8, 64, 1000, 100_000, 17 << 20:  # the last one is copied past the caches
    for offset in 0x1000, 0xff8, 0xfe1:
        if offset + count >= 0x1008:
            memory = memoryview(bytearray(count + 1))[1:]
            src, dst = ram.get_slice(offset, count), ram.get_slice((24 << 20) + offset, count)
            calls += [(ram.read_slice, memory, offset), (ram.write_slice, memory, offset)]
            calls += [(ram.read_bytes, offset, count), (ram.fill, 7, offset, count)]
            calls += [(src.copy_to_volatile_slice, dst), (dst.copy_to_volatile_slice, src)]
for call, *arguments in calls:
    os.kill(os.getpid(), signal.SIGSTOP)
    call(*arguments)
os.kill(os.getpid(), signal.SIGSTOP)
"""
SCALAR_CALLS = [
    (name, width, call)
    for name, width in (("u8", 1), ("u16", 2), ("u32", 4), ("u64", 8), ("be32", 4), ("f64", 8))
    for call in ("load", "store", "read_obj", "write_obj")
]
PEEKUSER, POKEUSER, CONT = 3, 6, 7
RIP, DEBUG_REGISTERS = 16 * 8, 848  # in struct user
# Debug register 7: watch the 8 bytes at register 0 for reads and writes.
WATCH = 1 | 0b11 << 16 | 0b10 << 18


def watch(kind: str) -> Iterator[list[int]]:
    """Run the child; yield, for each of its calls, the addresses behind the accesses."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    ptrace.restype = ctypes.c_long
    with subprocess.Popen([sys.executable, "-c", CHILD, kind], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            address = child.stdout.readline()
            if not address:
                pytest.skip("the child may not be traced here")
            hits: list[int] | None = None
            while True:
                _, status = os.waitpid(child.pid, 0)
                if not os.WIFSTOPPED(status):
                    child.returncode = os.waitstatus_to_exitcode(status)
                    assert child.returncode == 0
                    return
                if os.WSTOPSIG(status) == signal.SIGTRAP:
                    assert hits is not None
                    hits.append(ptrace(PEEKUSER, child.pid, RIP, None) - module_base(child.pid))
                elif os.WSTOPSIG(status) == signal.SIGSTOP:
                    if hits is not None:
                        yield hits
                    elif (
                        ptrace(POKEUSER, child.pid, DEBUG_REGISTERS, int(address)) != 0
                        or ptrace(POKEUSER, child.pid, DEBUG_REGISTERS + 7 * 8, WATCH) != 0
                    ):
                        pytest.skip("no debug registers: " + os.strerror(ctypes.get_errno()))
                    hits = []
                ptrace(CONT, child.pid, None, None)
        finally:
            if child.returncode is None:
                child.kill()


def module_base(pid: int) -> int:
    with open(f"/proc/{pid}/maps") as maps:
        lines = [line for line in maps if line.rstrip().endswith(MODULE.name)]
    return min(int(line.split("-")[0], 16) for line in lines)


def width_of(code: str) -> int:
    """Return how many bytes an instruction moves between memory and a register, or 0."""
    if extended := re.match("mov[sz]([bw])", code):
        return {"b": 1, "w": 2}[extended[1]]
    outside = re.findall(r"%(\w+)", re.sub(r"\([^)]*\)", "", code))
    for width, names in (
        *((32, r"ymm\d+"), (16, r"xmm\d+"), (8, r"r[a-ds][xip]|r[bd]p|r\d+")),
        *((4, r"e[a-ds][xip]|ebp|r\d+d"), (2, r"[a-ds][xip]|bp|r\d+w"), (1, r"[a-ds][il]?l|r\d+b")),
    ):
        if any(re.fullmatch(names, register) for register in outside):
            return width
    return {"movb": 1, "movw": 2, "movl": 4, "movq": 8}.get(code.split(maxsplit=1)[0], 0)


@GUARDED
@pytest.mark.skipif(MACHINE != "x86_64", reason="the debug registers are x86-64's")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
@pytest.mark.parametrize("kind", ["anonymous", "file"])
def test_the_built_module_accesses_once(kind: str) -> None:
    before: dict[int, str] = {}  # the instruction that ends at an address
    code = ""
    for line in run("objdump", "-d", "--no-show-raw-insn", str(MODULE)).splitlines():
        if found := re.match(r"\s+([0-9a-f]+):\s+(.*)", line):
            before[int(found[1], 16)] = code
            code = re.sub(r"\s+", " ", found[2])
    watched = [[before[address] for address in hits] for hits in watch(kind)]
    for (name, width, call), codes in zip(SCALAR_CALLS, watched, strict=False):
        assert [width_of(code) for code in codes] == [width], (name, call, codes)
    copies = watched[len(SCALAR_CALLS) :]
    assert len(copies) == 6 * 13
    for codes in copies:
        assert len(codes) == 1, codes
        assert width_of(codes[0]) in {8, 16, 32}, codes
        assert "rep" not in codes[0]
