"""Processes that share a command: who has what, who was lost first, what is refused."""

import pytest

from qmix.errors import CTRL_C
from qmix.processes.group import ALONE, Group, LostPeerError
from qmix.processes.launch import first_lost
from tests.support.process import qmix
from tests.support.process_group import together


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8])
def test_every_item_is_one_processs_and_parts_are_alike(count):
    items = list(range(count))
    for size in (1, 2, 3, 5):
        groups = [Group(rank, size) for rank in range(size)]
        shares = [group.share(items) for group in groups]
        assert [item for mine in shares for item in mine] == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        rounds = zip(*(group.rounds(items) for group in groups), strict=True)
        assert [item for turn in rounds for mine in turn for item in mine] == items


def test_what_one_gives_all_get_in_order():
    def member(group):
        told = group.told("go" if group.is_first else None)
        return told, group.gathered([group.rank] * group.rank)

    assert together(member, member, member) == [("go", [1, 2, 2])] * 3
    assert member(ALONE) == ("go", [])


def test_the_process_that_made_the_others_end_is_the_lost_one():
    peer = LostPeerError.exit_code
    assert first_lost({0: peer, 2: -9}) == 2
    assert first_lost({0: 2, 1: peer}) == 0
    assert first_lost({1: 3, 2: CTRL_C}) == 1
    assert first_lost({0: peer, 1: peer}) == 0


def test_what_is_not_shared_is_refused(tmp_path, monkeypatch):
    command = ("quantize", tmp_path / "none", tmp_path / "out")
    refused = qmix(*command, "--processes", "2")
    assert (refused.returncode, "--processes does not apply" in refused.stderr) == (2, True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refused = qmix(*command, "--method", "gptq")
    assert (refused.returncode, "one machine" in refused.stderr) == (3, True)
