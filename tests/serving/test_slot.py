"""What a slot's cache shares with a prompt, and how little it costs to ask."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from qmix.serving.slot import Slot
from tests.support.models import small_model
from tests.support.promptness import within
from tests.support.soak import examples

MODEL = small_model(num_hidden_layers=1)
LONG = 1 << 15


def slot_of(ids):
    """A slot whose cache holds these ids."""
    slot = Slot(MODEL.new_cache(1))
    slot._held = array("q", ids)
    slot.cache.length = len(ids)
    return slot


@examples(50)
@given(
    st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), min_size=1, max_size=20)
)
def test_a_common_beginning_of_some_length_is_reusable_and_leaves_one_id_to_be_read(held, ids):
    common = 0
    while common < min(len(held), len(ids)) and held[common] == ids[common]:
        common += 1
    expected = min(common, len(ids) - 1) if common >= 8 else 0
    assert slot_of(held).reusable(array("q", ids)) == expected


def test_a_long_prompt_is_compared_with_all_slots_at_once():
    ids = array("q", range(LONG))
    slots = [slot_of([*ids[:-1], 0]) for _ in range(16)]
    with within(0.1):  # in Python it took 3 ms a slot
        for _ in range(10):
            assert [slot.reusable(ids) for slot in slots] == [LONG - 1] * 16
