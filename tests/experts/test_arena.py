"""The memory of experts: pinned in chunks of whole blobs, or not at all."""

import pytest
import torch

from qmix.errors import ResourceError
from qmix.experts import arena
from qmix.experts.arena import HostArena, SlotArena


class Cudart:
    """Registers up to `limit` bytes."""

    def __init__(self, limit=1 << 60):
        self.limit, self.held = limit, {}

    def cudaHostRegister(self, pointer, size, flags):  # noqa: N802
        assert flags == 3
        if sum(self.held.values()) + size > self.limit:
            return 2
        self.held[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer):  # noqa: N802
        del self.held[pointer]
        return 0


def test_an_arena_is_pinned_in_chunks_of_whole_blobs(monkeypatch):
    monkeypatch.setattr(arena, "PIN_BYTES", 100_000)
    own, runtime = HostArena(20, 30_000), Cudart()
    assert own.stride == 32768
    assert own.pin(runtime)
    assert own.pinned
    assert sorted(runtime.held.values()) == [2 * 32768] + [3 * 32768] * 6
    start = own.blob(0).data_ptr()
    assert start % 4096 == 0
    for index in range(20):
        place = own.blob(index)
        assert len(place) == 30_000
        chunk = max(p for p in runtime.held if p <= place.data_ptr())
        assert place.data_ptr() + 30_000 <= chunk + runtime.held[chunk]
    own.unpin()
    assert not runtime.held


def test_a_failure_to_pin_is_loud_counted_and_takes_everything_back(monkeypatch):
    monkeypatch.setattr(arena, "PIN_BYTES", 100_000)
    own, runtime = HostArena(20, 30_000), Cudart(limit=300_000)
    with pytest.warns(UserWarning, match=r"could not be pinned.*0\.00 GiB.*error 2.*ulimit -l"):
        assert not own.pin(runtime)
    assert not runtime.held
    assert not own.pinned
    assert own.unpinned_bytes == 20 * 32768
    own.blob(19).fill_(7)  # still memory


def test_no_memory_is_one_clear_error():
    with pytest.raises(ResourceError, match=r"no host memory for the experts.*smaller ram"):
        HostArena(1 << 20, 1 << 40)


def test_memory_that_was_not_written_is_not_resident():
    own = HostArena(64, 4 << 20)
    own.blob(3).fill_(1)
    assert own.blob(2).data_ptr() + own.stride == own.blob(3).data_ptr()
    assert len(own) == 64


def test_the_address_of_a_slot_is_that_of_its_blob():
    slots = SlotArena(3, 300, torch.device("cpu"))
    for slot in range(3):
        assert slots.address(slot) == slots.blob(slot).data_ptr()
    for slot in (-1, 3):
        with pytest.raises(AssertionError):
            slots.address(slot)
