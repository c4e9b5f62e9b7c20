"""The extension module and how it is compiled. Everything else is in pyproject.toml."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

# Before setuptools, which needs a working compiler configuration of its own on other systems.
if sys.platform != "linux" or sys.implementation.name != "cpython" or sys.maxsize < 2**32:
    raise SystemExit(
        "guestmem needs CPython on 64-bit Linux; "
        f"this is {sys.implementation.name} on {sys.platform}, {sys.maxsize.bit_length() + 1} bits."
    )

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# One wheel for every build with a GIL from 3.11 on. A free-threaded interpreter before 3.15 has no
# stable ABI, so there the module is built for that version alone. GUESTMEM_FULL_API=1 does the same
# anywhere: for debug interpreters, and to measure what the limited API costs.
LIMITED_API = not (
    sysconfig.get_config_var("Py_GIL_DISABLED") or os.environ.get("GUESTMEM_FULL_API") == "1"
)

CFLAGS = [
    *("-std=c11", "-O2", "-g0", "-Wall", "-Wextra"),
    "-fvisibility=hidden",
    "-fno-plt",  # saves a jump on every call of the C-API
    "-fno-strict-aliasing",  # guest memory has no type of its own
    *("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"),  # with an older compiler, 3 is a warning
    "-fstack-protector-strong",
    "-fno-lto",  # it tears apart what fault.c has the assembler put side by side
]
if sysconfig.get_platform().endswith("x86_64"):
    CFLAGS.append("-fcf-protection")
elif sysconfig.get_platform().endswith("aarch64"):
    CFLAGS.append("-mbranch-protection=standard")
LDFLAGS = ["-Wl,-z,relro,-z,now"]


def from_environment(name: str) -> list[str]:
    """Return the environment's flags, but for LTO."""
    flags = shlex.split(os.environ.get(name, ""))
    return [flag for flag in flags if not flag.startswith("-flto")]


class BuildExt(build_ext):
    """Says in one sentence what is missing, where the compiler would say it in twenty."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the module so that every version the wheel is for finds it.

        3.15 puts the platform into the suffix, where older ones do not look.
        """
        filename = super().get_ext_filename(fullname)
        return re.sub(r"\.abi3\S*\.so$", ".abi3.so", filename) if LIMITED_API else filename

    def build_extensions(self) -> None:
        """Try the compiler on the headers first."""
        if missing := self.missing():
            raise SystemExit(f"guestmem cannot be built without {missing}.")
        super().build_extensions()

    def missing(self) -> str | None:
        """Name the first thing that is missing, with the packages that give it."""
        dirs = [f"-I{d}" for d in self.compiler.include_dirs]
        command = [*self.compiler.compiler_so, *dirs, "-E", "-x", "c", "-", "-o", os.devnull]
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for header, what in (
            ("errno.h", "the C library's headers (package libc6-dev, glibc-devel or musl-dev)"),
            ("Python.h", f"the headers of {python} (package {python}-dev, -devel or python3-dev)"),
        ):
            try:
                include = f"#include <{header}>\n".encode()
                probe = subprocess.run(command, input=include, capture_output=True, check=False)
            except FileNotFoundError:
                return f"a C compiler: {command[0]} is not there (package gcc or clang)"
            if probe.returncode:
                return what
        return None


setup(
    ext_modules=[
        Extension(
            "guestmem._native",
            sources=sorted(map(str, Path("csrc").glob("*.c"))),
            depends=sorted(map(str, Path("csrc").glob("*.h"))),  # this also puts them in the sdist
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if LIMITED_API else [],
            py_limited_api=LIMITED_API,
            # setuptools puts the environment's flags first; here they have the last word.
            extra_compile_args=CFLAGS + from_environment("CFLAGS"),
            extra_link_args=LDFLAGS + from_environment("LDFLAGS"),
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED_API else {},
    cmdclass={"build_ext": BuildExt},
)
