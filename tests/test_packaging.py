"""What is built, what is installed, and what a build says when it cannot work."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import guestmem
from guestmem import _native

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(guestmem.__file__).parent
MODULE = Path(_native.__file__)
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

# Compilers and other programs must not inherit what a sanitizer run preloads into Python.
PLAIN_ENV = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "CFLAGS", "LDFLAGS")}


def run(*command: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        cwd=ROOT,
        env=PLAIN_ENV | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# What is installed


def test_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert guestmem.__version__ == importlib.metadata.version("guestmem") == project["version"]


def test_no_runtime_dependencies() -> None:
    requires = importlib.metadata.requires("guestmem") or []
    assert [r for r in requires if "extra ==" not in r] == []


def test_python_versions_have_no_cap() -> None:
    assert importlib.metadata.metadata("guestmem")["Requires-Python"] == ">=3.11"


def test_tests_run_against_the_installed_package() -> None:
    assert ROOT / "src" not in PACKAGE.parents


def test_installed_files() -> None:
    names = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*") if p.is_file()}
    assert names >= {"__init__.py", "_native.pyi", "py.typed", MODULE.name}
    assert {n.rpartition(".")[2] for n in names} - {"pyc"} == {"py", "pyi", "so", "typed"}


def test_wheel_tag_and_module_name_agree() -> None:
    wheel = importlib.metadata.distribution("guestmem").read_text("WHEEL")
    assert wheel is not None
    tag = re.search(r"^Tag: (\S+)-(\S+)-", wheel, re.MULTILINE)
    assert tag is not None
    if MODULE.name == "_native.abi3.so":
        assert not FREE_THREADED
        assert tag.groups() == ("cp311", "abi3")
    else:
        assert MODULE.name == f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        assert tag[2] != "abi3"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_only_the_init_function_is_exported() -> None:
    symbols = run("nm", "-D", "--defined-only", str(MODULE))
    assert symbols.returncode == 0, symbols.stderr
    names = {line.split()[-1] for line in symbols.stdout.splitlines()}
    # Instrumented builds add names of the compiler's, all reserved ones.
    # And the one in which calls fail says which.
    names -= {"inject_call", "inject_reached"} if "GUESTMEM_INJECTION_SITE" in os.environ else set()
    assert {n for n in names if not n.startswith("_")} == {"PyInit__native"}


# What a build does


def test_build_elsewhere_says_what_it_needs() -> None:
    for change, named in (
        ("sys.platform = 'darwin'", "on darwin, 64 bits"),
        ("sys.platform = 'win32'", "on win32, 64 bits"),
        ("sys.maxsize = 2**31 - 1", "on linux, 32 bits"),
        ("sys.implementation.name = 'pypy'", "this is pypy on linux"),
    ):
        code = f"import runpy, sys; {change}; runpy.run_path('setup.py', run_name='__main__')"
        result = run(sys.executable, "-c", code)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.startswith("guestmem needs CPython on 64-bit Linux; this is ")
        assert result.stderr.count("\n") == 1
        assert named in result.stderr


NO_PYTHON_HEADERS = """#!/bin/sh
for arg; do
    shift
    case $arg in -I*) ;; *) set -- "$@" "$arg" ;; esac
done
exec cc "$@"
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_build_names_what_is_missing(tmp_path: Path) -> None:
    compiler = tmp_path / "no-python-headers"
    compiler.write_text(NO_PYTHON_HEADERS)
    compiler.chmod(0o755)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for env, sentence in (
        ({"CC": "/nonexistent/cc"}, "a C compiler: /nonexistent/cc is not there (package gcc"),
        ({"CC": str(compiler)}, f"the headers of {version} (package {version}-dev, "),
        ({"CC": "cc", "CFLAGS": "-nostdinc"}, "the C library's headers (package libc6-dev, "),
    ):
        build = ("build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
        result = run(sys.executable, "-W", "ignore", "setup.py", *build, **env)
        assert result.returncode == 1
        assert f"guestmem cannot be built without {sentence}" in result.stderr
        assert "Traceback" not in result.stderr
        assert "error:" not in result.stderr
        assert list(tmp_path.rglob("*.o")) == []


READ_SETUP = """
import json, sys, sysconfig, warnings
warnings.simplefilter("ignore")
real, free_threaded = sysconfig.get_config_var, int(sys.argv[1])
sysconfig.get_config_var = lambda n: free_threaded if n == "Py_GIL_DISABLED" else real(n)
import setuptools
from distutils.core import run_setup
dist = run_setup("setup.py", stop_after="init")
(ext,) = dist.ext_modules
print(json.dumps({
    "limited": ext.py_limited_api,
    "macros": ext.define_macros,
    "wheel": dist.get_option_dict("bdist_wheel").get("py_limited_api", (None, None))[1],
    "cflags": ext.extra_compile_args,
    "ldflags": ext.extra_link_args,
    "depends": ext.depends,
    "sources": ext.sources,
}))
"""


def read_setup(*, free_threaded: bool, **env: str) -> dict[str, object]:
    result = run(sys.executable, "-c", READ_SETUP, str(int(free_threaded)), **env)
    assert result.returncode == 0, result.stderr
    values: dict[str, object] = json.loads(result.stdout)
    return values


def test_limited_api_with_a_gil() -> None:
    values = read_setup(free_threaded=False)
    assert values["limited"] is True
    assert values["macros"] == [["Py_LIMITED_API", "0x030B0000"]]
    assert values["wheel"] == "cp311"


def test_full_api_without_a_gil_and_on_request() -> None:
    for values in (
        read_setup(free_threaded=True),
        read_setup(free_threaded=False, GUESTMEM_FULL_API="1"),
    ):
        assert values["limited"] is False
        assert values["macros"] == []
        assert values["wheel"] is None


def test_flags_of_the_environment_come_last() -> None:
    flags = {"CFLAGS": "-O0 -flto=auto -DX='a b'", "LDFLAGS": "-flto -Wl,-z,lazy"}
    values = read_setup(free_threaded=False, **flags)
    assert isinstance(values["cflags"], list)
    assert isinstance(values["ldflags"], list)
    assert values["cflags"][-2:] == ["-O0", "-DX=a b"]
    assert values["ldflags"][-1] == "-Wl,-z,lazy"
    assert not any("-flto" in flag for flag in values["cflags"] + values["ldflags"])


def test_every_c_file_is_built_or_depended_on() -> None:
    values = read_setup(free_threaded=False)
    assert values["sources"] == sorted(f"csrc/{p.name}" for p in (ROOT / "csrc").glob("*.c"))
    assert values["depends"] == sorted(f"csrc/{p.name}" for p in (ROOT / "csrc").glob("*.h"))


# What the README promises


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_readme_command(heading: str) -> None:
    readme = (ROOT / "README.md").read_text()
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section is not None
    block = re.search(r"^```\w*\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    assert block is not None
    (command,) = block[1].splitlines()
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
