"""More than one interpreter, more than one module, and the end of one with all in use."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

# Runs code in a new isolated interpreter, by whatever this version of Python has for that.
SUBINTERPRETER = """
import sys, threading

def create():
    try:
        from concurrent import interpreters  # 3.14
    except ImportError:
        try:
            import _interpreters as interpreters  # 3.13
        except ImportError:
            try:
                import _xxsubinterpreters as interpreters
            except ImportError:
                print("this Python has no subinterpreters")
                sys.exit(77)
        which = interpreters.create()
        def run(code):
            call = getattr(interpreters, "exec", None) or interpreters.run_string
            failure = call(which, code)
            assert failure is None, failure
        return run, lambda: interpreters.destroy(which)
    which = interpreters.create()
    return which.exec, which.close

USE = '''
import gc, io, os, struct
import guestmem
from guestmem import GuestMemory, MemoryMapping, Ordering, VolatileSlice, u64, le32

memory = MemoryMapping(8192)
part = memory.get_slice(8, 64)
ref = part.get_ref(0, u64)
ref.store(2**64 - 1)
assert memory.read_obj(8, u64) == 2**64 - 1
memory.write_obj((1, 2), 0, struct.Struct("<II"))
assert memory.read_obj(0, struct.Struct("<II")) == (1, 2)
try:
    import ctypes  # which 3.12 refuses to load here
except ImportError:
    pass
else:
    class Point(ctypes.LittleEndianStructure):
        _fields_ = [("x", ctypes.c_uint32), ("y", ctypes.c_uint32)]
    assert memory.read_obj(0, Point).y == 2
    memory.write_obj(Point(3, 4), 0)
memory.read_to_memory(0, io.BytesIO(b"12345678"), 8)
try:
    memory.read_bytes(8192, 1)
except guestmem.InvalidAddressError as error:
    assert isinstance(error, guestmem.MmapError)
else:
    raise AssertionError
try:
    memory.close()
except BufferError:
    pass
tracked = MemoryMapping(8192, track_dirty=True)
guest = GuestMemory([(0, tracked), (8192, memory.get_slice(4096, 4096))])
guest.write_all(bytes(range(16)), 8184)
counter = guest.get_atomic_ref(8, u64)
assert counter.fetch_add(5, Ordering.RELAXED) == 0
assert counter.compare_exchange(5, 6) == (True, 5)
guestmem.fence(Ordering.ACQ_REL)
array = guest.get_array_ref(4096, 4, le32)
assert array.copy_from([1, 2, 3, 4]) == 4 and array[1:].tolist() == [2, 3, 4]
assert guest.take_dirty() == [(0, 8192)] and tracked.dirty.count == 0
fd = os.memfd_create("interpreters")
assert guestmem.pwritev(fd, guest.slices(8184, 16), 0) == 16
assert guestmem.preadv(fd, guest.slices(8180, 16), 0) == 16
os.close(fd)
assert guest.read_bytes(8180, 16) == bytes(range(16))
try:
    guest.read_obj(12288, u64)
except guestmem.InvalidGuestAddressError as error:
    assert error.addr == 12288
else:
    raise AssertionError
more = guest.with_region(1 << 20, MemoryMapping(4096))
round_and_round = [more, array, counter, tracked.dirty, iter(array), guest.slices(0, 8)]
round_and_round.append(round_and_round)
own = bytearray(8)
cycle = [VolatileSlice.from_buffer(own)]
cycle.append(cycle)
view = memoryview(memory)
'''
"""


def in_subinterpreters(run_child: Callable[..., str], code: str) -> str:
    program = SUBINTERPRETER + textwrap.dedent(code)
    return run_child(program, options=("-W", "ignore"), skip=77).strip()


def test_subinterpreters_one_after_the_other(run_child: Callable[..., str]) -> None:
    code = """
    for _ in range(10):
        run, destroy = create()
        run(USE)
        destroy()
    exec(USE)  # the main one works, before and after
    run, destroy = create()
    run(USE)
    destroy()
    ref.store(7)
    assert part.read_obj(0, u64) == 7
    print("done")
    """
    assert in_subinterpreters(run_child, code) == "done"


def test_subinterpreters_at_the_same_time(run_child: Callable[..., str]) -> None:
    code = """
    several = [create() for _ in range(4)]
    for run, _ in several:
        run(USE)
    for run, _ in several:
        run("ref.store(ref.load() - 1); assert ref.load() == 2**64 - 2")
        run("assert counter.fetch_sub(1) == 6 and guest.take_dirty() == [(0, 8192)]")
    several.pop(1)[1]()
    for run, _ in several:
        run("assert part.read_obj(0, u64) == 2**64 - 2; gc.collect()")
    for _, destroy in several:
        destroy()
    print("done")
    """
    assert in_subinterpreters(run_child, code) == "done"


def test_subinterpreters_in_threads(run_child: Callable[..., str]) -> None:
    """Each with a GIL of its own where Python can do that: 3.12 and later."""
    code = """
    failed = []
    more = (
        "for _ in range(200):\\n"
        "    big = MemoryMapping(300_000)\\n"
        "    big.fill(7)\\n"
        "    assert big.read_bytes(0, 300_000) == bytes([7]) * 300_000"
    )

    def work():
        run, destroy = create()
        try:
            run(USE + more)
        except BaseException as error:
            failed.append(error)
        destroy()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    print("done")
    """
    assert in_subinterpreters(run_child, code) == "done"


def test_the_module_twice(run_child: Callable[..., str]) -> None:
    code = """
    import gc, importlib, sys, weakref
    import guestmem
    from guestmem import _native
    first = guestmem.MemoryMapping(64)
    ref = first.get_ref(0, guestmem.u64)

    assert importlib.reload(guestmem) is guestmem
    assert importlib.reload(_native) is _native
    for name in [name for name in sys.modules if name.partition(".")[0] == "guestmem"]:
        del sys.modules[name]
    import guestmem as again
    assert again is not guestmem
    assert again.MemoryMapping is not guestmem.MemoryMapping
    second = again.MemoryMapping(64)
    ref.store(5)
    assert first.read_obj(0, guestmem.u64) == 5
    # The one's types are strangers to the other.
    for call in (lambda: second.read_obj(0, guestmem.u64), lambda: first.get_ref(0, again.u64)):
        try:
            call()
        except TypeError:
            pass
        else:
            raise AssertionError
    try:
        first.get_slice(0, 8).copy_to_volatile_slice(second.get_slice(0, 8))
    except TypeError:
        pass
    else:
        raise AssertionError
    try:
        second.read_bytes(65, 0)
    except again.InvalidAddressError as error:
        assert not isinstance(error, guestmem.InvalidAddressError)
    assert second.write_slice(first, 0) == 64  # buffers are buffers

    gone = [weakref.ref(_native), weakref.ref(guestmem.MemoryMapping)]
    del first, ref, guestmem, _native, call
    gc.collect()
    gc.collect()
    print(sum(to() is not None for to in gone))
    second.write_obj(1, 0, again.u64)
    """
    assert run_child(code).strip() == "0"


def test_modules_that_come_and_go(run_child: Callable[..., str]) -> None:
    """Importing again and again leaves nothing: neither modules nor types nor mappings."""
    code = """
    import gc, sys

    def once():
        for name in [name for name in sys.modules if name.partition(".")[0] == "guestmem"]:
            del sys.modules[name]
        import ctypes
        import guestmem
        memory = guestmem.MemoryMapping(4096)
        ref = memory.get_ref(0, ctypes.c_uint16 * 4)
        ref.load()
        memory.read_obj(0, guestmem.be16)
        guest = guestmem.GuestMemory([(0, memory), (4096, guestmem.MemoryMapping(4096))])
        made = guestmem.GuestMemory.from_ranges([(0, 4096)])
        counter = guest.get_atomic_ref(4096, guestmem.u64)
        counter.fetch_add(1, guestmem.Ordering.RELAXED)
        array = guest.get_array_ref(0, 8, ctypes.c_uint16)
        tracked = guestmem.MemoryMapping(4096, track_dirty=True)
        keep = [memory, ref, memoryview(memory), guest, made, counter, array, tracked.dirty]
        keep.append(keep)

    def count():
        gc.collect()
        gc.collect()
        with open("/proc/self/maps") as file:
            return len(gc.get_objects()), sum("/dev/zero" in line for line in file)

    for _ in range(3):
        once()
    before = count()
    for _ in range(20):
        once()
    after = count()
    print(after[0] - before[0] < 20, after[1] - before[1] <= 0)
    """
    assert run_child(code).strip() == "True True"


LIVE = """
import ctypes, io, struct, sys, threading, weakref
import guestmem
from guestmem import MemoryMapping, VolatileSlice, u64

class Point(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint32), ("y", ctypes.c_uint32)]

class Bytes(bytearray):
    pass

class Node:
    pass

mapping = MemoryMapping(8192)
part = mapping.get_slice(0, 4096)
inner = part.get_slice(8, 64)
ref = mapping.get_ref(0, u64)
point = mapping.get_ref(0, Point)
Point.held = point
layout = mapping.get_ref(0, struct.Struct("<II"))
view = memoryview(mapping)
export = memoryview(inner)[3:]
word = ctypes.c_uint64.from_buffer(mapping, 16)

tracked = MemoryMapping(8192, track_dirty=True)
guest = guestmem.GuestMemory([(0, tracked), (8192, MemoryMapping(4096))])
made = guestmem.GuestMemory.from_ranges([(0, 4096), (4096, 4096)])
counter = guest.get_atomic_ref(0, u64)
points = made.get_array_ref(8, 4, Point)
Point.array = points
dirty = memoryview(tracked.dirty)
pieces, items, regions = made.slices(4000, 200), iter(points), guest.regions
next(pieces), next(items)

owner = Bytes(64)
owner.held = VolatileSlice.from_buffer(owner)
owner.ref = owner.held.get_ref(0, u64)
owner.view = memoryview(owner.held)
node = Node()
node.self = node
node.all = [mapping, part, ref, view, owner, point, guest, made, counter, points, dirty, pieces]
sys.kept = [node, u64, mapping.read_obj]
"""


@pytest.mark.parametrize(
    "end",
    [
        "",
        "sys.exit(0)",
        "del mapping, part, inner, ref, view",
        "weak = weakref.ref(mapping, lambda _: part.fill(1))",
        "import atexit; atexit.register(lambda: mapping.write_obj(1, 0, u64))",
        "with part: pass\ntry:\n    with mapping: 1 / 0\nexcept ZeroDivisionError: pass",
        "class Late:\n    def __del__(self): ref.store(part.size)\nnode.late = Late()",
        "weak = weakref.ref(guest, lambda _: counter.fetch_add(1))\ndel guest",
        "del tracked, guest, made, regions",
        "import atexit; atexit.register(lambda: (made.fill(1, 0, 8192), guest.take_dirty()))",
        "try:\n    with made, guest: 1 / 0\nexcept ZeroDivisionError: pass\ncounter.fetch_add(1)",
        "class Late:\n    def __del__(self): counter.store(points[0].x)\nnode.late = Late()",
        "import numpy; sys.kept.append(numpy.frombuffer(mapping, numpy.uint8))",
    ],
    ids=[
        *("globals", "exit", "some", "weakref", "atexit", "with", "del"),
        *("guest weakref", "guest some", "guest atexit", "guest with", "guest del", "numpy"),
    ],
)
def test_an_interpreter_ends_with_everything_alive(run_child: Callable[..., str], end: str) -> None:
    code = LIVE
    if end.startswith("with part"):
        code += "export.release(); del owner.view\n"
        code = code.replace("export = memoryview(inner)[3:]", "export = memoryview(inner)")
    printed = run_child(code + end + "\nprint('end')", options=("-X", "dev"))
    assert printed == ("" if end == "sys.exit(0)" else "end\n")


def test_an_interpreter_ends_while_a_thread_waits_in_a_guest(run_child: Callable[..., str]) -> None:
    code = """
    import os, threading, time
    from guestmem import GuestMemory, preadv
    guest = GuestMemory.from_ranges([(0, 4096), (4096, 4096)])
    read_end, write_end = os.pipe()
    for call, *arguments in (
        (guest.read_to_memory, 4092, read_end, 8),
        (preadv, read_end, list(guest.slices(4092, 8))),
    ):
        threading.Thread(target=call, args=arguments, daemon=True).start()
    time.sleep(0.05)
    try:
        guest.close()
    except BufferError:
        print("in use")
    """
    assert run_child(code) == "in use\n"


def test_an_interpreter_ends_while_a_thread_waits_inside(run_child: Callable[..., str]) -> None:
    code = """
    import os, threading, time
    from guestmem import MemoryMapping
    memory = MemoryMapping(4096)
    read_end, write_end = os.pipe()
    threading.Thread(target=memory.read_to_memory, args=(0, read_end, 8), daemon=True).start()
    time.sleep(0.05)
    try:
        memory.close()
    except BufferError as error:
        print(error)
    """
    assert "1 running call" in run_child(code)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="__release_buffer__ came with 3.12")
def test_a_buffer_that_is_released_when_the_module_goes(run_child: Callable[..., str]) -> None:
    """What runs while garbage is cleared still finds the module's state."""
    code = """
        import gc, os
        import guestmem
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # some clear the exporter's class first
        gc.collect()  # its types are in the oldest generation
        def main():
            held = []
            class Exporter:
                def __buffer__(self, flags):
                    return memoryview(bytearray(64))
                def __release_buffer__(self, view, write=os.write):
                    write(1, b"released\\n")
                    self.get_slice(0, 8)
                    try:
                        self.read_bytes(200, 8)
                    except BaseException:
                        pass
            e = Exporter()
            held.append(guestmem.VolatileSlice.from_buffer(e))
            e.held = held
            other = guestmem.VolatileSlice.from_buffer(bytearray(100))
            e.get_slice, e.read_bytes = other.get_slice, other.read_bytes
            return held
        keep = main()
    """
    assert run_child(code) in ("released\n", "")
