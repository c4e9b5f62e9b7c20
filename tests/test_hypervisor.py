"""Run tests/hypervisor, the example, as its users do: in a process of its own, on real CPUs."""

import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HYPERVISOR = Path(__file__).with_name("hypervisor")
TIMEOUT = 60  # seconds; the slowest of these takes one

# Python code to run in the child before the hypervisor.
NO_UNICORN = "import sys; sys.modules['unicorn'] = None\n"
NO_KVM = """
import ctypes, struct, sys
libc = ctypes.CDLL(None)
# Landlock: from here on, this process may open nothing for writing, so not /dev/kvm either.
ruleset = libc.syscall(444, struct.pack("=Q", 1 << 1), 8, 0)
if ruleset < 0 or libc.prctl(38, 1, 0, 0, 0) or libc.syscall(446, ruleset, 0):
    sys.exit(77)
"""
# A shell starts a background job with SIGINT ignored, and children inherit that.
HEED_INTERRUPT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
WRONG_GUEST = f"""
import sys
sys.path.insert(0, {str(HYPERVISOR)!r})
import guest
# F(46), not F(47); and the second look finds the word, not the memory
guest.CODE = guest.CODE.replace(bytes.fromhex("b92f00"), bytes.fromhex("b92e00"))
guest.CODE = guest.CODE.replace(bytes.fromhex("e81400"), bytes.fromhex("6689c2"))
"""


def why_not(engine: str) -> str | None:
    """Return why this machine cannot run an engine, None if it can."""
    if engine == "unicorn":
        return None if importlib.util.find_spec("unicorn") else "unicorn is not installed"
    if platform.machine() != "x86_64":
        return f"the KVM engine is for x86-64, not {platform.machine()}"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    return None


@pytest.fixture(params=["kvm", "unicorn"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if reason := why_not(name):
        pytest.skip(reason)
    return name


def command(*arguments: str | Path, prelude: str = "") -> list[str]:
    start = [str(HYPERVISOR)]
    if prelude:
        run = f"import runpy; runpy.run_path({str(HYPERVISOR)!r}, run_name='__main__')"
        start = ["-c", prelude + run]
    # -X dev: a file left open would be a line on stderr
    return [sys.executable, "-X", "dev", *start, *map(str, arguments)]


def hypervise(*arguments: str | Path, prelude: str = "") -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command(*arguments, prelude=prelude),
        capture_output=True,
        check=False,
        text=True,
        timeout=TIMEOUT,
    )
    if prelude and result.returncode == 77:
        pytest.skip("no Landlock to take /dev/kvm away with")
    # Under Landlock a coverage build cannot write its counts either, and says so.
    result.stderr = re.sub(r"(?m)^profiling:.*\n", "", result.stderr)
    return result


def complaint(result: subprocess.CompletedProcess[str], status: int) -> str:
    """Return the one line on stderr."""
    assert result.returncode == status, result
    assert re.fullmatch(r"hypervisor: .+\n", result.stderr), result.stderr
    return result.stderr


def printing(text: bytes, origin: int = 0x1000, then: str = "f4") -> bytes:
    """Return a guest that prints a text by rep outsb and goes on with other code (hlt)."""
    start = origin + 13
    return (
        b"\xbe" + start.to_bytes(2, "little")  # mov si, start
        + b"\xba\xf8\x03"  # mov dx, 0x3f8
        + b"\xb9" + len(text).to_bytes(2, "little")  # mov cx, len(text)
        + b"\xf3\x6e"  # rep outsb
        + b"\xeb" + bytes([len(text)])  # jmp over the text
        + text
        + bytes.fromhex(then)
    )  # fmt: skip


def test_built_in_guest(engine: str) -> None:
    result = hypervise("--engine", engine)
    assert result.returncode == 0, result
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert " ".join(line.split()[0] for line in lines) == (
        "engine memory guest counter result remove guest word zeros dump halted"
    )
    assert lines[0] == f"engine   {engine}"
    checks = [line for line in lines if re.match("counter|result|remove|word|zeros|dump", line)]
    assert all(line.endswith(" ok") for line in checks)
    assert "F(47) = 2971215073" in result.stdout
    assert "zeros now" in lines[6]

    # That the numbers grow is that host and guest ran at once.
    counted = [int(number) for number in re.findall(r"\d+", lines[3])]
    assert len(counted) == 4
    assert counted == sorted(set(counted))


def test_wrong_guest_fails_the_checks(engine: str) -> None:
    result = hypervise("--engine", engine, prelude=WRONG_GUEST)
    assert result.returncode == 1, result
    assert result.stderr == ""
    failed = [line.split()[0] for line in result.stdout.splitlines() if line.endswith("FAILED")]
    assert failed == ["result", "zeros"]
    assert "still hold data" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("not every check passed")


def test_auto_takes_what_there_is() -> None:
    no_kvm = why_not("kvm")
    if no_kvm and why_not("unicorn"):
        pytest.skip(f"no engine: {no_kvm}, no unicorn")
    result = hypervise()
    assert result.returncode == 0, result
    expected = r"unicorn \(auto: .+\)" if no_kvm else r"kvm \(auto: /dev/kvm can be used\)"
    assert re.fullmatch("engine   " + expected, result.stdout.splitlines()[0])


def test_auto_without_kvm(tmp_path: Path) -> None:
    if reason := why_not("unicorn"):
        pytest.skip(reason)
    image = tmp_path / "image"
    image.write_bytes(printing(b"hello\n"))
    result = hypervise(image, prelude=NO_KVM)
    assert result.returncode == 0, result
    assert re.match(r"engine   unicorn \(auto: /dev/kvm: .+\)\n", result.stdout)
    assert "\nhello\n" in result.stdout


def test_engine_that_cannot_be_used() -> None:
    no_kvm = complaint(hypervise("--engine", "kvm", prelude=NO_KVM), 2)
    if not why_not("kvm"):
        assert no_kvm == "hypervisor: /dev/kvm: Permission denied\n"
    no_unicorn = complaint(hypervise("--engine", "unicorn", prelude=NO_UNICORN), 2)
    assert "pip install unicorn" in no_unicorn
    neither = complaint(hypervise(prelude=NO_KVM + NO_UNICORN), 2)
    assert "kvm: " in neither
    assert "unicorn: " in neither


def test_boot_sector(engine: str, tmp_path: Path) -> None:
    image = tmp_path / "boot.img"
    image.write_bytes(printing(b"sector 0\n", 0x7C00).ljust(510, b"\0") + b"\x55\xaa")
    result = hypervise(image, "--engine", engine)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[1] == f"memory   4 MiB; {image}, 512 bytes, at 0x7c00"
    assert lines[2] == "sector 0"
    assert re.fullmatch(r"halted   after \d+\.\d\d s", lines[3])


def test_flat_binary_and_dump(engine: str, tmp_path: Path) -> None:
    image, dump = tmp_path / "flat.bin", tmp_path / "ram"
    # mov word [0x3000], 0x4d47; hlt. The text does not end its line.
    code = printing(b"flat", then="c7060030474df4")
    image.write_bytes(code)
    result = hypervise(image, "--engine", engine, "--memory", "1", "--dump", dump)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[1:3] == [
        f"memory   1 MiB; {image}, {len(code)} bytes, at 0x1000",
        "flat",
    ]
    ram = dump.read_bytes()
    assert len(ram) == 1 << 20
    assert ram[0x1000:].startswith(code)
    assert ram[0x3000:0x3004] == b"GM\0\0"


def test_serial_port(engine: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(
        bytes.fromhex(
            "bafb03 b080 ee"  # mov dx, 0x3fb; mov al, 0x80; out dx, al: the divisor latch
            "baf803 b001 ee"  # mov dx, 0x3f8; mov al, 1; out dx, al: 115200 baud, not a byte
            "bafb03 b003 ee"  # mov dx, 0x3fb; mov al, 3; out dx, al: 8 bits, latch off
            "ec 0430 88c4"  # in al, dx; add al, '0'; mov ah, al: reads back as 3
            "bafd03 ec 3c60 7402 0f0b"  # mov dx, 0x3fd; in al, dx; cmp al, 0x60; je +2; ud2: ready
            "e680"  # out 0x80, al: a port that nobody has
            "baf803 88e0 ee"  # mov dx, 0x3f8; mov al, ah; out dx, al
            "b8410a ef"  # mov ax, 0x0a41; out dx, ax: only the low byte is the data port's
            "ba0001 ed 40 7402 0f0b"  # mov dx, 0x100; in ax, dx; inc ax; jz +2; ud2: all ones
            "f4"  # hlt
        )
    )
    result = hypervise(image, "--engine", engine)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[2] == "3A"


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "fifo", "too large", "name"])
def test_bad_image(kind: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    if kind == "directory":
        image.mkdir()
    elif kind == "empty":
        image.touch()
    elif kind == "fifo":
        os.mkfifo(image)
    elif kind == "too large":
        image.touch()
        os.truncate(image, (1 << 20) - 0x1000 + 1)
    elif kind == "name":
        image = tmp_path / ("x" * 300)
    result = hypervise(image, "--memory", "1")
    reason = {
        "missing": "No such file or directory",
        "directory": "not a regular file",
        "empty": "the image is empty",
        "fifo": "not a regular file",
        "too large": "the image has 1044481 bytes, the RAM has 1044480 from 0x1000 on",
        "name": "File name too long",
    }[kind]
    assert f"{image}: {reason}" in complaint(result, 2)
    assert result.stdout == ""


def test_image_that_just_fits(engine: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"\xf4")
    os.truncate(image, (1 << 20) - 0x1000)
    assert hypervise(image, "--memory", "1", "--engine", engine).returncode == 0


@pytest.mark.parametrize(
    "options",
    [["--memory", "0"], ["--memory", "1025"], ["--memory", "4M"], ["--engine", "x"], ["a", "b"]],
    ids=" ".join,
)
def test_bad_options(options: list[str]) -> None:
    assert options[-1] in complaint(hypervise(*options), 2)


# lidt [0x1011], where it is zeros; mov eax, cr0; or al, 1; mov cr0, eax; xor cx, cx; div cx
TRIPLE_FAULT = "0f011e1110 0f20c0 0c01 0f22c0 31c9 f7f1 000000000000"
# mov ax, 0xffff; mov ds, ax; mov byte [0xffff], 1: above 1 MiB
OUTSIDE = "b8ffff 8ed8 c606ffff01 f4"


@pytest.mark.parametrize(
    ("code", "kvm_says", "unicorn_says"),
    [
        pytest.param(TRIPLE_FAULT, "triple fault", "UC_ERR_EXCEPTION", id="triple fault"),
        pytest.param(OUTSIDE, "access outside the RAM", "UC_ERR_WRITE_UNMAPPED", id="outside"),
    ],
)
def test_guest_that_cannot_go_on(
    engine: str, code: str, kvm_says: str, unicorn_says: str, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes.fromhex(code))
    message = complaint(hypervise(image, "--engine", engine, "--memory", "1"), 1)
    assert re.match(r"hypervisor: the guest stopped at 0000:10[0-9a-f]{2}: ", message)
    assert (kvm_says if engine == "kvm" else unicorn_says) in message


@pytest.mark.parametrize(
    "forever",
    [
        "ebfe",  # jmp $: the CPU never leaves the guest
        "bafd03 ec ebfd",  # mov dx, 0x3fd; in al, dx; jmp to the in: it leaves all the time
    ],
    ids=["spinning", "polling"],
)
def test_interrupt(engine: str, forever: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(printing(b"here we go\n", then=forever))
    with subprocess.Popen(
        command(image, "--engine", engine, prelude=HEED_INTERRUPT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line == "here we go\n":
                    break
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=TIMEOUT)
        finally:
            child.kill()
    assert errors == "hypervisor: interrupted\n"
    assert child.returncode == 130


def test_nobody_reads_the_output(engine: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        command("--engine", engine),
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
        text=True,
        timeout=TIMEOUT,
    )
    os.close(writer)
    assert "Broken pipe" in complaint(result, 1)


def test_dump_that_cannot_be_written(engine: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "ram"
    assert str(missing) in complaint(hypervise("--engine", engine, "--dump", missing), 1)
