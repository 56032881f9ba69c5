"""The memory of experts: pinned in chunks of whole blobs, or not at all."""

import pytest
import torch

from qmix.errors import ResourceError
from qmix.experts import arena
from qmix.experts.arena import HostArena, SlotArena


class Cuda:
    """Registers up to `limit` bytes, which the device sees elsewhere; one chunk may be unseen."""

    def __init__(self, limit=1 << 60, unseen=None):
        self.limit, self.unseen, self.held, self.seen = limit, unseen, {}, {}

    def register(self, pointer, size):
        if sum(self.held.values()) + size > self.limit:
            return 2
        self.held[pointer] = size
        return 0

    def unregister(self, pointer):
        del self.held[pointer]

    def device_pointer(self, pointer):
        if len(self.seen) == self.unseen:
            return None
        self.seen[pointer] = (1 << 44) + (len(self.seen) << 30)
        return self.seen[pointer]


def test_an_arena_is_pinned_in_chunks_of_whole_blobs(monkeypatch):
    monkeypatch.setattr(arena, "PIN_BYTES", 100_000)
    own, runtime = HostArena([30_000] * 20), Cuda()
    assert own.blob(1).data_ptr() - own.blob(0).data_ptr() == 32768
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
    own, runtime = HostArena([30_000] * 20), Cuda(limit=300_000)
    with pytest.warns(UserWarning, match=r"could not be pinned.*0\.00 GiB.*error 2.*ulimit -l"):
        assert not own.pin(runtime)
    assert not runtime.held
    assert not own.pinned
    assert own.unpinned_bytes == 20 * 32768
    own.blob(19).fill_(7)  # still memory


def test_the_device_is_asked_where_it_reads_a_blob(monkeypatch):
    monkeypatch.setattr(arena, "PIN_BYTES", 100_000)
    own, runtime = HostArena([30_000] * 20), Cuda()
    assert [own.device_address(i) for i in range(20)] == [own.blob(i).data_ptr() for i in range(20)]
    assert own.pin(runtime)
    for index in range(20):
        pointer = own.blob(index).data_ptr()
        chunk = max(p for p in runtime.held if p <= pointer)
        assert own.device_address(index) == runtime.seen[chunk] + pointer - chunk
    own.unpin()
    assert own.device_address(3) == own.blob(3).data_ptr()


def test_memory_that_the_device_does_not_see_is_not_pinned(monkeypatch):
    monkeypatch.setattr(arena, "PIN_BYTES", 100_000)
    own, runtime = HostArena([30_000] * 20), Cuda(unseen=4)
    with pytest.warns(UserWarning, match=r"could not be pinned.*no address for the device"):
        assert not own.pin(runtime)
    assert not runtime.held
    assert own.unpinned_bytes == 20 * 32768
    assert own.pin(runtime, in_place=False)  # it may still be copied


def test_blobs_have_sizes_of_their_own(monkeypatch):
    """Each on pages of its own, none across two registrations, though one fills a whole one."""
    monkeypatch.setattr(arena, "PIN_BYTES", 5 * 4096)
    sizes = [3, 4096, 4097, 30_000, 1, 4096 * 4]
    own, runtime = HostArena(sizes), Cuda()
    starts = [own.blob(i).data_ptr() - own.blob(0).data_ptr() for i in range(6)]
    assert starts == [0, 4096, 2 * 4096, 4 * 4096, 12 * 4096, 13 * 4096]
    assert [len(own.blob(i)) for i in range(6)] == sizes
    assert own.nbytes == 30_000
    assert own.pin(runtime)
    assert list(runtime.held.values()) == [4 * 4096, 8 * 4096, 5 * 4096]
    assert own.pinned_bytes == 17 * 4096
    for index in range(6):
        pointer = own.blob(index).data_ptr()
        chunk = max(p for p in runtime.held if p <= pointer)
        assert own.device_address(index) == runtime.seen[chunk] + pointer - chunk
    own.unpin()
    assert not runtime.held


def test_no_memory_is_one_clear_error():
    with pytest.raises(ResourceError, match=r"no host memory for the experts.*smaller ram"):
        HostArena([1 << 40] * (1 << 20))


def test_memory_that_was_not_written_is_not_resident():
    own = HostArena([4 << 20] * 64)
    own.blob(3).fill_(1)
    assert own.blob(2).data_ptr() + (4 << 20) == own.blob(3).data_ptr()
    assert len(own) == 64


def test_the_address_of_a_slot_is_that_of_its_blob():
    slots = SlotArena(3, 300, torch.device("cpu"))
    for slot in range(3):
        assert slots.address(slot) == slots.blob(slot).data_ptr()
    for slot in (-1, 3):
        with pytest.raises(AssertionError):
            slots.address(slot)
