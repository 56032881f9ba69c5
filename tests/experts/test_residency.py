"""The state machine of slots: random and adversarial sequences, copies that fail or come late."""

import random
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qmix.errors import ResourceError
from qmix.experts.policy import HEAT, LRU, ONE, PRESETS, STATIC, Policy, PolicySettings
from qmix.experts.residency import Residency, SlotState
from tests.support.soak import examples

EXPERTS = 12
LAYER = 4
IDS = st.integers(0, EXPERTS - 1)


class Machine(RuleBasedStateMachine):
    """Any calls in any order, beside a plain model of what each slot's memory holds.

    `memory` is what a copy has really written; the table may only point to what lies there.
    """

    @initialize(
        slots=st.integers(0, EXPERTS),
        chosen=st.one_of(
            st.sampled_from(list(PRESETS.values())),
            st.builds(
                PolicySettings,
                decay=st.integers(0, ONE),
                margin=st.integers(0, 3 * ONE),
                uploads=st.one_of(st.none(), st.integers(0, 4)),
                heat_weight=st.integers(0, 1),
                recency_weight=st.integers(0, 1),
            ),
        ),
    )
    def begin(self, slots, chosen):
        self.policy = Policy(EXPERTS, chosen)
        self.residency = Residency(EXPERTS, slots, self.policy)
        self.memory = [None] * slots
        self.begun, self.over, self.borrowed = [], [], ()
        self.warmed = self.admitted = self.fetched = 0
        self.hits = self.misses = self.tokens = self.failures = self.late = 0
        self.met = {}  # whether a fetch since the last token met the expert READY

    def start(self, uploads, used=()):
        """What a copier does: the victim's bytes are gone from the moment the copy begins."""
        for upload in uploads:
            assert upload.evicted not in used
            assert upload.evicted != upload.expert
            assert self.residency.slot_of_id[upload.expert] == -1
            assert all(other.slot != upload.slot for other in self.begun), "two copies, one slot"
            assert upload.slot not in self.borrowed
            self.memory[upload.slot] = None
            self.begun.append(upload)

    @rule(order=st.permutations(range(EXPERTS)))
    def warm(self, order):
        free = self.residency.states.count(SlotState.FREE)
        uploads = self.residency.warm([*order, *order])
        absent = [e for e in order if self.residency.slot_of_id[e] < 0]
        held = {upload.expert for upload in self.begun}
        assert [u.expert for u in uploads] == [e for e in absent if e not in held][:free]
        assert all(upload.evicted == -1 for upload in uploads)
        self.start(uploads)
        self.warmed += len(uploads)

    @rule(used=st.lists(IDS, max_size=10))
    def token(self, used):
        before = list(self.residency.slot_of_id)
        flying = len(self.begun)
        uploads = self.residency.token(used)
        self.start(uploads, used)
        for expert in set(used):
            hit = self.met.get(expert, before[expert] >= 0)
            self.hits += hit
            self.misses += not hit
            if before[expert] >= 0:
                assert self.residency.slot_of_id[expert] == before[expert]
        most = self.policy.settings.uploads
        if most is not None:
            assert len(uploads) <= most
            assert not uploads or flying + len(uploads) <= 2 * most
        assert {upload.expert for upload in uploads} <= set(used)
        score, margin = self.policy.score, self.policy.settings.margin
        for upload in uploads:
            if upload.evicted >= 0:
                assert score(upload.expert) > score(upload.evicted) + margin
                left = [e for e in range(EXPERTS) if self.residency.slot_of_id[e] >= 0]
                assert all(
                    self.policy.key(upload.evicted) < self.policy.key(e)
                    for e in left
                    if e not in used
                )
        self.met.clear()
        self.tokens += 1
        self.admitted += len(uploads)

    @rule(needed=st.lists(IDS, min_size=1, max_size=4, unique=True))
    def step_that_fetches(self, needed):
        """A layer of the disk tier, with copies that end at once."""
        for expert in needed:
            known = {upload.expert: upload for upload in self.begun}
            ready = self.residency.slot_of_id[expert] >= 0
            self.met.setdefault(expert, ready)
            usable = [
                slot
                for slot, state in enumerate(self.residency.states)
                if state is SlotState.FREE
                or (state is SlotState.READY and self.residency.id_of_slot[slot] not in needed)
            ]
            if not usable and not ready and expert not in known:
                with pytest.raises(ResourceError, match="no slot is left"):
                    self.residency.fetch(expert, needed)
                break
            upload = self.residency.fetch(expert, needed)
            assert (upload is None) == ready
            if upload is not None and expert in known:
                assert upload == known[expert]
            elif upload is not None:
                self.start([upload], needed)
                self.fetched += 1
                self.finish(upload)

    def finish(self, upload):
        self.begun.remove(upload)
        self.over.append(upload)
        self.memory[upload.slot] = upload.expert
        assert self.residency.ready(upload)
        assert self.residency.slot_of_id[upload.expert] == upload.slot

    @precondition(lambda self: self.begun)
    @rule(data=st.data())
    def copy_ends(self, data):
        self.finish(data.draw(st.sampled_from(self.begun)))

    @precondition(lambda self: self.begun)
    @rule(data=st.data())
    def copy_fails(self, data):
        upload = data.draw(st.sampled_from(self.begun))
        self.begun.remove(upload)
        self.over.append(upload)
        self.residency.failed(upload)
        self.failures += 1
        assert self.residency.states[upload.slot] is SlotState.FREE

    @precondition(lambda self: self.over)
    @rule(data=st.data(), how=st.sampled_from(["ready", "failed"]))
    def late_report(self, data, how):
        before = (list(self.residency.slot_of_id), list(self.residency.states))
        assert not getattr(self.residency, how)(data.draw(st.sampled_from(self.over)))
        assert (self.residency.slot_of_id, self.residency.states) == before
        self.late += 1

    @precondition(lambda self: not self.borrowed)
    @rule(count=st.integers(1, 4))
    def borrow(self, count):
        able = sum(state in (SlotState.FREE, SlotState.READY) for state in self.residency.states)
        try:
            self.borrowed = self.residency.borrow(count)
        except ResourceError:
            assert able < count
            return
        assert len(set(self.borrowed)) == count
        assert all(upload.slot not in self.borrowed for upload in self.begun)
        for slot in self.borrowed:
            self.memory[slot] = "a layer of the prompt"

    @precondition(lambda self: self.borrowed)
    @rule()
    def return_slots(self):
        self.residency.return_slots(self.borrowed)
        self.borrowed = ()

    @invariant()
    def tables_agree(self):
        r = self.residency
        for expert, slot in enumerate(r.slot_of_id):
            if slot >= 0:
                assert r.id_of_slot[slot] == expert
                assert r.states[slot] is SlotState.READY
                assert self.memory[slot] == expert  # the copy has really ended
        for slot, expert in enumerate(r.id_of_slot):
            assert (r.states[slot] is SlotState.READY) == (
                expert >= 0 and r.slot_of_id[expert] == slot
            )
            assert (expert < 0) == (r.states[slot] in (SlotState.FREE, SlotState.BORROWED))
        held = [expert for expert in r.id_of_slot if expert >= 0]
        assert len(held) == len(set(held))
        assert set(r._filling.values()) == set(self.begun)
        assert r.states.count(SlotState.FILLING) == len(self.begun)
        assert {s for s, state in enumerate(r.states) if state is SlotState.BORROWED} == set(
            self.borrowed
        )

    @invariant()
    def everything_is_counted(self):
        counts = self.residency.counts
        assert (counts.tokens, counts.hits, counts.misses) == (self.tokens, self.hits, self.misses)
        assert (counts.warmed, counts.admissions) == (self.warmed, self.admitted)
        assert counts.fetches == self.fetched
        assert counts.failures == self.failures
        assert counts.late == self.late
        copies = counts.warmed + counts.admissions + counts.fetches
        assert copies == len(self.begun) + len(self.over)


Machine.TestCase.settings = examples(15, stateful_step_count=40)
TestStateMachine = Machine.TestCase


def filled(settings, experts=EXPERTS, slots=4, **options):
    policy = Policy(experts, settings, **options)
    residency = Residency(experts, slots, policy)
    for upload in residency.warm(policy.order(experts)):
        assert residency.ready(upload)
    return residency


def test_duplicate_routes_are_one_visit_and_one_upload():
    residency = filled(LRU, slots=2)
    uploads = residency.token([7, 7, 0, 7, 0])
    assert [upload.expert for upload in uploads] == [7]
    assert (residency.counts.hits, residency.counts.misses) == (1, 1)


def test_an_expert_under_way_is_not_asked_for_again_and_still_a_miss():
    residency = filled(LRU, slots=3)
    (upload,) = residency.token([9])
    assert residency.token([9]) == ()
    assert residency.counts.misses == 2
    assert residency.ready(upload)
    assert residency.token([9]) == ()
    assert residency.counts.hits == 1


def test_a_victim_leaves_at_once_and_its_slot_holds_nothing_until_the_copy_has_ended():
    residency = filled(LRU, slots=3)
    (upload,) = residency.token([9])
    assert (upload.evicted, upload.slot) == (0, 0)
    assert residency.slot_of_id[0] == residency.slot_of_id[9] == -1
    assert residency.id_of_slot[0] == 9
    assert residency.states[0] is SlotState.FILLING


def test_a_late_copy_of_an_earlier_generation_is_rejected():
    """The same expert into the same slot twice: only the generation tells them apart."""
    residency = filled(LRU, experts=2, slots=1)
    (first,) = residency.token([1])
    residency.failed(first)
    (second,) = residency.token([1])
    assert (first.expert, first.slot) == (second.expert, second.slot)
    assert not residency.ready(first)
    assert residency.slot_of_id[1] == -1
    assert residency.ready(second)
    assert not residency.ready(second)
    assert residency.counts.late == 2


def test_a_failed_copy_frees_the_slot_for_the_next():
    residency = filled(HEAT, slots=2)
    for _ in range(9):
        uploads = residency.token([7])
        if uploads:
            break
    residency.failed(uploads[0])
    assert residency.counts.failures == 1
    # A free slot is given without a margin.
    (upload,) = residency.token([5])
    assert (upload.slot, upload.evicted) == (uploads[0].slot, -1)


def test_admission_waits_until_the_heat_exceeds_the_victims_by_the_margin():
    residency = filled(PolicySettings(decay=ONE, margin=2 * ONE), slots=2)
    assert [len(residency.token([5])) for _ in range(3)] == [0, 0, 1]


def test_slow_copies_cannot_empty_the_slots():
    residency = filled(PolicySettings(margin=0, uploads=2), experts=40, slots=20)
    for token in range(30):
        residency.token(range(token % 10, token % 10 + 25))
    assert residency.states.count(SlotState.FILLING) == 4
    assert residency.states.count(SlotState.READY) == 16


def test_hits_are_those_of_the_fetches():
    residency = filled(STATIC, slots=2)

    def step(needed):
        for expert in needed:
            upload = residency.fetch(expert, needed)
            if upload is not None:
                residency.ready(upload)

    step([5, 6])
    residency.token([])
    for needed in ([5, 6], [7, 8], [5, 9]):  # three layers on two slots
        step(needed)
    # 5 was READY when its first layer asked for it; a token that names it twice counts it once.
    assert residency.token([5, 6, 7, 8, 5, 9]) == ()
    assert (residency.counts.hits, residency.counts.misses) == (2, 3)
    assert residency.counts.fetches == 2 + 4


def test_too_few_slots_for_a_step_is_one_clear_error():
    residency = filled(LRU, slots=1)
    upload = residency.fetch(5, [5, 6])
    residency.ready(upload)
    with pytest.raises(ResourceError, match="more slots than the 2 experts") as caught:
        residency.fetch(6, [5, 6])
    assert caught.value.exit_code == 4


# Independent oracles: nothing of qmix below this line but the Residency they judge.


def lru_hits(steps, slots, held):
    """Fill on every miss, least recent first, never one that the same step needs."""
    cache = OrderedDict.fromkeys(held)
    hits = []
    for step in steps:
        for expert in step:
            hits.append(expert in cache)
            if expert not in cache and len(cache) == slots:
                cache.pop(next(e for e in cache if e not in step))
            cache[expert] = None
            cache.move_to_end(expert)
    return hits


def lru_token_hits(tokens, slots, held):
    """The same a token at a time: all looked up at once, the missed ones admitted at its end.

    The most recent come first, in place of what the token did not use.
    """
    cache = OrderedDict.fromkeys(held)
    hits = []
    for token in tokens:
        hits.append([expert in cache for expert in token])
        for expert in token:
            if expert in cache:
                cache.move_to_end(expert)
        stale = [e for e in cache if e not in token]
        missed = [e for e in token if e not in cache]
        room = slots - len(cache) + len(stale)
        kept = missed[max(0, len(missed) - room) :]
        for _ in range(len(cache) + len(kept) - slots):
            cache.pop(stale.pop(0))
        rank = {expert: at for at, expert in enumerate(token)}
        cache.update(dict.fromkeys(kept))
        for expert in sorted((e for e in cache if e in rank), key=rank.__getitem__):
            cache.move_to_end(expert)
    return hits


def layer_trace(rng, tokens, layers=3, per_layer=LAYER, chosen=2, skew=0):
    """Tokens x layers x ids over all layers; a positive skew makes low numbers likelier."""
    weights = [1 / (1 + skew * expert) for expert in range(per_layer)]
    trace = []
    for _ in range(tokens):
        token = []
        for layer in range(layers):
            ids = []
            while len(ids) < chosen:
                (expert,) = rng.choices(range(per_layer), weights)
                if layer * per_layer + expert not in ids:
                    ids.append(layer * per_layer + expert)
            token.append(ids)
        trace.append(token)
    return trace


@given(st.integers(0, 10**6), st.integers(2, EXPERTS), st.integers(0, 3))
def test_lru_that_fetches_equals_the_oracle_hit_for_hit(seed, slots, skew):
    trace = layer_trace(random.Random(seed), 40, skew=skew)
    residency = filled(LRU, slots=slots)
    got = []
    for token in trace:
        for step in token:
            for expert in step:
                upload = residency.fetch(expert, step)
                got.append(upload is None)
                if upload is not None:
                    assert residency.ready(upload)
        residency.token([expert for step in token for expert in step])
    expected = lru_hits([s for token in trace for s in token], slots, range(slots))
    assert got == expected
    assert residency.counts.hits == sum(expected)


@given(st.integers(0, 10**6), st.integers(1, EXPERTS), st.integers(0, 3))
def test_lru_that_admits_everything_equals_the_oracle_hit_for_hit(seed, slots, skew):
    trace = layer_trace(random.Random(seed), 40, skew=skew)
    tokens = [[expert for step in token for expert in step] for token in trace]
    residency = filled(LRU, slots=slots)
    got = []
    for token in tokens:
        got.append([residency.slot_of_id[expert] >= 0 for expert in token])
        for upload in residency.token(token):
            assert residency.ready(upload)
    assert got == lru_token_hits(tokens, slots, range(slots))
    assert residency.counts.hits == sum(map(sum, got))
