"""The model of the CUDA caching allocator, against traces whose answer is known and rules that hold for every trace."""

import random

import pytest

from qlora.planning.allocator import (
    EMPTY_CACHE, CachingAllocator, OutOfMemory, live_peaks, parts_at_peak, replay,
)
from qlora.planning.trace import Event

MIB = 2**20
SEEDS = range(12)


def trace(*steps, phase="train", part="activations"):
    """Events from ("a", 3 * MIB) to allocate and ("a",) to release."""
    numbers, sizes, events = {}, {}, []
    for name, *size in steps:
        if size:
            numbers[name], sizes[name] = len(numbers) + 1, size[0]
            events.append(Event(numbers[name], size[0], "op", phase, part))
        else:
            events.append(Event(numbers[name], -sizes[name], "op", phase, part))
    return events


def random_trace(seed, num_steps=3000):
    """Small, middling and large storages that come and go; about a hundred are alive at a time."""
    draw = random.Random(seed)
    alive, events = {}, []
    for number in range(num_steps):
        if alive and (len(alive) > 100 or draw.random() < 0.45):
            gone = draw.choice(list(alive))
            events.append(Event(gone, -alive.pop(gone), "op", "train", "activations"))
        alive[number] = int(2 ** draw.uniform(4, draw.choice([14, 21, 26])))
        events.append(Event(number, alive[number], "op", "train", "activations"))
    return events


def ending(events):
    """Releases of everything that a trace leaves behind."""
    alive = {event.storage: event.size_bytes for event in events if event.size_bytes > 0}
    for event in events:
        if event.size_bytes < 0:
            del alive[event.storage]
    return [Event(number, -size, "op", "train", "activations") for number, size in alive.items()]


@pytest.mark.parametrize(("size", "allocated", "reserved"), [
    (1, 512, 2 * MIB),
    (512, 512, 2 * MIB),
    (513, 1024, 2 * MIB),
    (45_568, 45_568, 2 * MIB),  # these two: a memory snapshot of a GPU, as published
    (8_519_680, 8_519_680, 20 * MIB),
    (MIB, MIB, 2 * MIB),  # the largest that the small pool serves
    (MIB + 1, MIB + 512, 20 * MIB),
    (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
    (10 * MIB, 10 * MIB, 10 * MIB),
    (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
    (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB that is left over is not split off, and counts as handed out
    (19 * MIB, 20 * MIB, 20 * MIB),
])
def test_one_request(size, allocated, reserved):
    result = replay(trace(("a", size)))
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (allocated, reserved)


@pytest.mark.parametrize(("size", "reserved"), [(1, 2 * MIB), (3 * MIB, 20 * MIB), (25 * MIB, 40 * MIB)])
def test_one_request_of_an_expandable_segment(size, reserved):
    result = replay(trace(("a", size)), expandable=True)
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (-(-size // 512) * 512, reserved)


def test_neighbours_merge():
    parts = [("a", 6 * MIB), ("b", 6 * MIB), ("c", 6 * MIB)]
    assert replay(trace(*parts, ("a",), ("b",), ("d", 12 * MIB))).peak_reserved_bytes == 20 * MIB
    assert replay(trace(*parts, ("a",), ("c",), ("d", 12 * MIB))).peak_reserved_bytes == 32 * MIB
    assert replay(trace(*parts, ("a",), ("c",), ("b",), ("d", 18 * MIB))).peak_reserved_bytes == 20 * MIB


def test_the_smallest_hole_that_fits_is_taken():
    # 30 MiB go into the hole of 30, so that 40 still fit into theirs.
    held = [("large", 40 * MIB), ("small", 30 * MIB), ("large",), ("small",)]
    assert replay(trace(*held, ("a", 30 * MIB), ("b", 40 * MIB))).peak_reserved_bytes == 70 * MIB


def test_of_equal_holes_the_newer_segment_is_taken():
    # The older segment has 30 MiB free beside 10 that are released later; taken first, they would leave no room for 40.
    held = [("old", 40 * MIB), ("old",), ("a", 30 * MIB), ("rest", 10 * MIB), ("new", 30 * MIB), ("a",), ("new",)]
    assert replay(trace(*held, ("b", 30 * MIB), ("rest",), ("c", 40 * MIB))).peak_reserved_bytes == 70 * MIB


def test_pools_do_not_mix():
    steps = [("a", 30 * MIB), ("a",), ("b", 1000)]
    assert replay(trace(*steps)).peak_reserved_bytes == 32 * MIB


def test_at_the_limit_free_segments_are_given_back():
    events = trace(("a", 30 * MIB), ("b", 30 * MIB), ("a",), ("c", 40 * MIB))
    assert replay(events).peak_reserved_bytes == 100 * MIB
    capped = replay(events, limit_bytes=80 * MIB)
    assert (capped.peak_reserved_bytes, capped.num_retries, capped.out_of_memory) == (70 * MIB, 1, False)
    assert replay(events, limit_bytes=69 * MIB).out_of_memory


def test_a_segment_in_use_is_not_given_back():
    # 12 of 30 MiB are still in use: the whole segment stays, and with it 18 MiB that 20 do not fit into.
    events = trace(("a", 30 * MIB), ("a",), ("b", 12 * MIB), ("c", 18 * MIB), ("c",), ("d", 20 * MIB))
    assert replay(events, limit_bytes=49 * MIB).out_of_memory
    # Of an expandable segment the free pages go back: 20 MiB stay for the 12, and 8 of them serve the 20.
    assert not replay(events, limit_bytes=49 * MIB, expandable=True).out_of_memory


def test_pages_given_back_are_used_again():
    allocator = CachingAllocator(expandable=True)
    for key in range(5):
        allocator.allocate(key, 20 * MIB)
    for key in (1, 2, 3):
        allocator.free(key)
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (40 * MIB, 40 * MIB)
    allocator.allocate(5, 50 * MIB)  # fits into the hole of three pages
    assert allocator.reserved_bytes == 100 * MIB
    allocator.allocate(6, 30 * MIB)  # 10 MiB are left there; this one goes to the end
    assert allocator.reserved_bytes == 140 * MIB


def test_an_expandable_segment_grows_from_its_free_end():
    # 24 MiB take two pages, of which 16 MiB are free; 30 need one page more.
    assert replay(trace(("a", 24 * MIB), ("b", 30 * MIB)), expandable=True).peak_reserved_bytes == 60 * MIB


def test_the_end_of_an_expandable_segment_is_taken_last():
    # 8 MiB would fit best into the 10 at the end, but those could grow: they go into the hole of 24, which 24 then miss.
    steps = [("a", 24 * MIB), ("b", 6 * MIB), ("a",), ("c", 8 * MIB), ("d", 24 * MIB)]
    assert replay(trace(*steps), expandable=True).peak_reserved_bytes == 60 * MIB


def test_emptying_the_cache():
    events = [*trace(("a", 30 * MIB), ("b", 10 * MIB), ("a",)), Event(0, 0, EMPTY_CACHE, "later", "workspace")]
    result = replay(events)
    assert (result.reserved_by_phase["train"], result.reserved_by_phase["later"]) == (40 * MIB, 10 * MIB)


def test_phases_have_peaks_of_their_own():
    events = [*trace(("a", 40 * MIB), ("b", 20 * MIB), ("b",), phase="train"),
              Event(9, 10 * MIB, "op", "eval", "loss"), Event(9, -10 * MIB, "op", "eval", "loss")]
    result = replay(events)
    assert result.allocated_by_phase == {"train": 60 * MIB, "eval": 50 * MIB}
    assert result.reserved_by_phase == {"train": 60 * MIB, "eval": 60 * MIB}
    assert live_peaks(events) == {"train": 60 * MIB, "eval": 50 * MIB}


def test_parts_at_the_peak():
    events = [Event(1, 1000, "op", "load", "base"), Event(2, 5000, "op", "train", "activations"),
              Event(3, 100, "op", "train", "loss"), Event(2, -5000, "op", "train", "activations"),
              Event(4, 3000, "op", "eval", "loss")]
    phase, parts = parts_at_peak(events)
    assert (phase, parts) == ("train", {"base": 1024, "activations": 5120, "loss": 512})
    assert sum(parts.values()) == live_peaks(events)["train"]


def test_nothing_happened():
    assert replay([]).peak_reserved_bytes == 0 and live_peaks([]) == {} and parts_at_peak([]) == ("", {})


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_rules_that_hold_for_every_trace(seed, expandable):
    events = random_trace(seed)
    live, allocator = 0, CachingAllocator(expandable=expandable)
    for event in [*events, *ending(events)]:
        live += event.size_bytes
        if event.size_bytes > 0:
            allocator.allocate(event.storage, event.size_bytes)
        else:
            allocator.free(event.storage)
        assert live <= allocator.allocated_bytes <= allocator.reserved_bytes
    assert allocator.allocated_bytes == 0
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_limits(seed, expandable):
    events = random_trace(seed)
    free = replay(events, expandable=expandable)
    assert free.num_retries == 0 and not free.out_of_memory
    assert replay(events, expandable=expandable, limit_bytes=free.peak_reserved_bytes) == free
    least = live_peaks(events)["train"]
    assert replay(events, expandable=expandable, limit_bytes=least - 1).out_of_memory
    capped = replay(events, expandable=expandable, limit_bytes=(least + free.peak_reserved_bytes) // 2)
    assert capped.peak_reserved_bytes <= (least + free.peak_reserved_bytes) // 2


@pytest.mark.parametrize("seed", SEEDS)
def test_expandable_segments_need_no_more_than_a_page_beyond(seed):
    events = random_trace(seed)
    native, expandable = replay(events), replay(events, expandable=True)
    assert expandable.peak_reserved_bytes <= native.peak_reserved_bytes + 22 * MIB
    assert expandable.peak_allocated_bytes == live_peaks(events)["train"] <= native.peak_allocated_bytes


def test_the_error_says_what_did_not_fit():
    allocator = CachingAllocator(limit_bytes=MIB)
    with pytest.raises(OutOfMemory, match="3000000 bytes"):
        allocator.allocate(1, 3_000_000)
