"""A pytest plugin: what qemu does not do as the kernel does is skipped, with its reason."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

MADVISE = "qemu answers madvise() itself: it says yes, and does nothing"
POPULATE = "qemu says yes to MADV_POPULATE_WRITE, by which a page that cannot be had is told"
COMPILER = "gcc and objdump are those of the machine that emulates"
SYNDROME = "qemu gives no esr_context: nobody knows whether a fault was a write"
SAYS = "qemu says on stderr that a signal ended the process"
SKIPPED = {
    r"test_core_dump\.py::test_guest_memory_is_in_no_core_dump": MADVISE,
    r"test_mapping\.py::test_(anonymous_memory|memory_of_a_file)$": MADVISE,
    r"test_mapping\.py::test_remove_range(\[|_gives_|_of_|_refuses_a_start)": MADVISE,
    r"test_model\.py::": MADVISE,
    r"test_processes\.py::test_what_a_child_removes": MADVISE,
    r"test_range_edges\.py::test_edges\[.*remove_range": MADVISE,
    r"test_file_io_ranges\.py::test_.*fault": POPULATE,
    r"test_faults\.py::test_(each_access\[.*, fd-|a_page_that_comes_back)": POPULATE,
    r"test_faults\.py::test_a_copy_knows": SYNDROME,
    r"test_faults\.py::test_a_full_tmpfs": MADVISE,
    r"test_dirty\.py::test_(writes_that_fail_half_way|a_source_that_fails)": POPULATE,
    r"test_dirty\.py::test_remove_range_that_is_refused": MADVISE,
    r"test_(block_device|virtqueue)\.py::test_memory_that_is_gone": POPULATE,
    r"test_guest\.py::test_faults": POPULATE,
    r"test_guest\.py::test_all_addresses": "qemu keeps something for each page: of 64 TiB too much",
    r"test_vectored\.py::test_(errors|whose_page|a_page_that_comes_back)": POPULATE,
    r"test_faults\.py::test_what_others_do_with_the_signal\[.*(foreign|host|kill|raise)": SAYS,
    r"test_fault_chain\.py::": COMPILER,
    r"test_disassembly\.py::.*(\[aarch64\]|test_the_built_copies_are_the_same)": COMPILER,
}


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        for pattern, reason in SKIPPED.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))
