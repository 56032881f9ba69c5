"""The device's table of addresses: what the host does for it, and when it does nothing."""

import pytest
import torch

from qmix.experts.arena import SlotArena
from qmix.experts.copiers import HostCopier
from qmix.experts.gpu_sources import AddressTable


class Residency:
    """Which expert is in which slot."""

    def __init__(self, experts):
        self.slot_of_id = [-1] * experts


class Copier(HostCopier):
    """Counts the writes, and fails if it is told to."""

    writes, broken = 0, False

    def write(self, values, target):
        if self.broken:
            raise KeyboardInterrupt
        self.writes += 1
        super().write(values, target)


class Slots(SlotArena):
    """Counts the addresses that it is asked for; makes no view."""

    asked = 0

    def address(self, slot):
        self.asked += 1
        return super().address(slot)

    def blob(self, slot):
        raise AssertionError("a view was made")


HOST = [1 << 40 | expert for expert in range(256)]


@pytest.fixture
def parts():
    residency, copier = Residency(256), Copier()
    slots = Slots(40, 64, torch.device("cpu"))
    device = torch.zeros(32, 8, dtype=torch.int64)
    return AddressTable(device, HOST, slots, residency, copier), residency, slots, copier


def test_the_table_begins_with_the_hosts_addresses(parts):
    table, *_ = parts
    assert table.addresses.view(-1).tolist() == HOST


def test_only_what_changed_is_looked_up_and_nothing_if_nothing_did(parts):
    table, residency, slots, copier = parts
    table.write()
    assert (copier.writes, slots.asked) == (1, 0)
    residency.slot_of_id[7], residency.slot_of_id[200] = 3, 39
    table.write()
    assert (copier.writes, slots.asked) == (2, 2)
    table.write()
    assert (copier.writes, slots.asked) == (2, 2)
    residency.slot_of_id[7] = -1
    table.write()
    expected = [*HOST]
    expected[200] = table.address(200)
    assert table.addresses.view(-1).tolist() == expected


def test_a_write_that_was_interrupted_is_done_by_the_next(parts):
    table, residency, _, copier = parts
    residency.slot_of_id[7], copier.broken = 3, True
    with pytest.raises(KeyboardInterrupt):
        table.write()
    copier.broken = False
    table.write()
    assert table.addresses.view(-1)[7] == table.address(7) != HOST[7]


def test_without_addresses_an_expert_that_is_in_no_slot_has_none():
    residency, slots = Residency(4), Slots(2, 64, torch.device("cpu"))
    device = torch.ones(1, 4, dtype=torch.int64)
    AddressTable(device, None, slots, residency, HostCopier())
    assert device.tolist() == [[0, 0, 0, 0]]
