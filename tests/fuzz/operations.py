"""The calls: each operation draws its arguments, makes its call, and keeps the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.fuzz import anything, arrays, atomics, copies, dirty, guests, memories, objects

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuzz.world import World

OPERATIONS: list[Callable[[World], None]] = [
    *(memories.make_anonymous, memories.make_of_file, memories.truncate, memories.get_slice),
    *(memories.offset_of_slice, memories.from_buffer, memories.close, memories.close_all),
    *(memories.leave_with, memories.exit_by_hand, memories.drop, memories.collect),
    memories.drop_all_but_one_kind,
    *(memories.export, memories.release_view, memories.resize_host),
    *(guests.make_guest, guests.make_of_ranges, guests.with_region, guests.without_region),
    *(guests.find, guests.look_at_guest, guests.slices, guests.memory_of_region),
    *(objects.read_obj, objects.write_obj, objects.get_ref, objects.load, objects.store),
    *(objects.to_slice, atomics.get_atomic_ref, atomics.atomic_load, atomics.atomic_store),
    *(atomics.atomic_fetch, atomics.compare_exchange, atomics.fences),
    *(arrays.get_array_ref, arrays.array_load, arrays.array_store, arrays.array_part),
    *(arrays.array_items, arrays.copy_array, arrays.copy_values, arrays.use_array),
    *(copies.copy_in_or_out, copies.copy_whole, copies.copy_between, copies.read_bytes),
    *(copies.fill, copies.remove_range, copies.transfer, copies.read_known, copies.write_known),
    *(copies.once, copies.read_once, copies.write_once),
    *(copies.read_scattered, copies.write_scattered, copies.scatter_anything),
    *(dirty.mark, dirty.is_dirty, dirty.look_at_pages, dirty.take, dirty.merge),
    *(dirty.guest_dirty, dirty.mark_guest, dirty.merge_guest),
    *(anything.look, anything.construct, anything.wrong_count, anything.plant),
    anything.init_struct_again,
]
