"""Every allocation and system call fails once: each call then raises what it should, nothing leaks,
and the next call works. In a build of the extension that is made for this alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import guestmem

ROOT = Path(__file__).resolve().parents[1]
INJECTION = Path(__file__).with_name("injection")
HEADER = INJECTION / "inject.h"
SITE = os.environ.get("GUESTMEM_INJECTION_SITE")
# Without a sanitizer: the build has none, and neither has the compiler.
ENV = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "CFLAGS", "LDFLAGS")}

# What the extension uses besides: it cannot fail as it is used.
INFALLIBLE = r"""
    Py(Bool|ByteArray|Bytes|CFunction|Complex|Float|Long|MemoryView|Slice|Type|Unicode)_Type
    | PyExc_\w+ | Py_Version | PySequence_Check | PySlice_AdjustIndices
    | PyStructSequence_SetItem | _Py_(True|False)Struct | qsort
    | PyBytes_(AsString|Size) | PyBool_FromLong | PyCFunction_Get\w+ | PyDict_Next
    | PyList_(GetItem|Size) | PyTuple_(GetItem|SetItem|Size)        # a new tuple, and in range
    | PyLong_As\w+ | PyUnicode_CompareWithASCIIString               # of exact ints: no code runs
    | PyIndex_Check | PyObject_CheckBuffer | PyType_(GetFlags|GetModuleState|GetSlot|IsSubtype)
    | PyBuffer_(FillInfo|Release) | PyMem_Free | PyObject_(Free|ClearWeakRefs) | PyObject_GC_\w+
    | PyErr_(Clear|ExceptionMatches|Fetch|NoMemory|NormalizeException|Occurred|Restore)
    | PyErr_WriteUnraisable | PyException_(GetTraceback|SetCause|SetContext|SetTraceback)
    | PyEval_\w+ | PyModuleDef_Init | PyModule_GetState | PyOS_snprintf
    | Py_GenericAlias | Py_LeaveRecursiveCall | _Py_Dealloc | _Py_NoneStruct
    | PyMem_[GS]etAllocator                                         # of inject.c itself
    | raise | pthread_sigmask | sig(add|empty)set | sigismember | syscall | getpid  # of SIGBUS
    | siglongjmp | mem(cmp|cpy|move|set)\w* | str(cmp|len)\w* | \w*snprintf\w* | strerror | sysconf
    | __\w+ | _ITM_\w+                                              # the compiler's, and errno
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build guestmem with what makes it fail; return where it can be imported from.

    The coverage stage of the gate has installed such a build, and says where.
    """
    if SITE is not None:
        return Path(SITE)
    work = tmp_path_factory.mktemp("injection")
    shutil.copytree(ROOT / "csrc", work / "csrc")
    for source in "inject.h", "inject.c":
        shutil.copy(INJECTION / source, work / "csrc")
    for name in "setup.py", "pyproject.toml", "README.md", "LICENSE":
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, work)
    package = work / "built" / "guestmem"
    shutil.copytree(
        Path(guestmem.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "*.pyi")
    )
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built"],
        cwd=work,
        env=ENV | {"CFLAGS": "-include csrc/inject.h -O0 -U_FORTIFY_SOURCE", "LDFLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "cannot be built without" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
    return package.parent


def injected_functions() -> set[str]:
    return {
        name.removeprefix("_").removesuffix("_SizeT")
        for name in re.findall(r"^# ?define (?!INJECT)(\w+)\(", HEADER.read_text(), re.MULTILINE)
    }


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
@pytest.mark.skipif(SITE is not None, reason="a coverage build calls more")
def test_all_that_can_fail_is_made_to(build: Path) -> None:
    """Whatever the extension calls is in inject.h, or cannot fail."""
    (module,) = (build / "guestmem").glob("*.so")
    if ".abi3." not in module.name:
        pytest.skip("only the limited API's functions are all called by their names")
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True
    ).stdout
    used = {line.split()[-1].partition("@")[0] for line in listing.splitlines()}
    used = {name for name in used if not re.fullmatch(INFALLIBLE, name, re.VERBOSE)}
    used = {re.sub(r"^_(?=Py)|_SizeT$|64$", "", name) for name in used}
    assert used - injected_functions() == set()


@pytest.fixture(scope="module")
def report(build: Path) -> Any:
    result = subprocess.run(
        [sys.executable, INJECTION / "run.py"],
        env=ENV | {"PYTHONPATH": str(build)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


@pytest.mark.slow
def test_every_failure_is_told_and_nothing_is_left_over(report: Any) -> None:
    assert report["failures"] == []


@pytest.mark.slow
def test_no_failure_is_swallowed_but_those_that_may_be(report: Any) -> None:
    assert report["swallowed"] == []
    assert report["not swallowed"] == []


@pytest.mark.slow
def test_everything_has_failed_somewhere(report: Any) -> None:
    assert injected_functions() - set(report["reached"]) == set()
    assert {"malloc", "calloc", "realloc"} <= set(report["reached"])
    assert report["calls"] > 150
    assert all(count > report["calls"] for count in report["injections"].values())
