"""The simulated machine with the real Residency inside: times, bytes, events; and replays.

`PYTHONPATH=. python tests/evals/routing/test_simulation.py` writes the golden event log anew.
"""

import random
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import UsageError
from qmix.evals.routing import replay, trace
from qmix.evals.routing.simulation import Faults, SimClock, SimTier, SimulatedMachine, Simulation
from qmix.evals.routing.trace import Trace, TraceHeader
from qmix.experts.policy import HEAT, LFU, LRU, ONE, PRESETS, STATIC, Policy, PolicySettings
from qmix.experts.residency import Residency, SlotState
from tests.support.models import GOLDEN

EVENTS = GOLDEN / "residency-events.txt"
# Sizes and rates that divide: every request takes whole nanoseconds, so formulas hold exactly.
ROUND = SimulatedMachine(
    expert_bytes=1000,
    dense_bytes=5000,
    device=10**10,
    interconnect=10**8,
    cpu=2 * 10**8,
    sync_ns=700,
)


def random_trace(seed, tokens, layers=3, experts=4, chosen=2, skew=0.0):
    rng = random.Random(seed)
    weights = [1 / (1 + skew * expert) for expert in range(experts)]

    def choice():
        ids = []
        while len(ids) < chosen:
            (expert,) = rng.choices(range(experts), weights)
            if expert not in ids:
                ids.append(expert)
        return tuple(ids)

    header = TraceHeader(layers=layers, experts=experts, chosen=chosen)
    return Trace(header, tuple(tuple(choice() for _ in range(layers)) for _ in range(tokens)))


def simulated(found, slots, chosen=HEAT, machine=ROUND, **options):
    policy = Policy(found.header.layers * found.header.experts, chosen)
    simulation = Simulation(Residency(len(policy.heat), slots, policy), machine, **options)
    simulation.warm(policy.order(found.header.experts))
    for token in found.ids():
        simulation.token(token)
    return simulation


def test_what_is_due_first_is_done_first():
    clock, seen = SimClock(), []
    for when, name in ((5, "b"), (3, "a"), (5, "c"), (9, "d")):
        clock.at(when, lambda name=name: seen.append((clock.now, name)))
    clock.at(3, lambda: clock.at(4, lambda: seen.append((clock.now, "from within"))))
    clock.advance(5)
    assert seen == [(3, "a"), (4, "from within"), (5, "b"), (5, "c")]
    assert clock.now == 5
    with pytest.raises(AssertionError):
        clock.advance(4)


def test_a_tier_moves_one_thing_after_the_other_and_rounds_up():
    clock = SimClock()
    tier = SimTier(clock, 3 * 10**9, latency_ns=10)
    assert tier.move("a", 10) == 4 + 10  # 3.33 ns
    assert tier.move("b", 9) == 14 + 3 + 10
    clock.advance(100)
    assert tier.move("a", 1) == 100 + 1 + 10
    assert tier.move("a", 0) == 100
    assert tier.moved == {"a": 11, "b": 9}


FAULTS = st.builds(
    Faults, st.integers(0, 99), st.sampled_from([0, 100, 500]), st.sampled_from([0, 50_000])
)


@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(2, 12),
    name=st.sampled_from(sorted(PRESETS)),
    path=st.sampled_from(["read", "cpu", "copy"]),
    lag=st.integers(0, 3),
    faults=FAULTS,
)
def test_every_byte_is_in_the_ledger(seed, slots, name, path, lag, faults):
    found = random_trace(seed, 25, skew=1.0)
    # An admitted copy stays under way while a step needs all other slots: the disk tier admits
    # none.
    chosen = PRESETS[name] if path != "copy" else PolicySettings(uploads=0)
    simulation = simulated(found, slots, chosen, path=path, lag=lag, faults=faults)
    simulation.drain()
    counts, size, activations = simulation.residency.counts, ROUND.expert_bytes, 25 * 3 * 2
    assert counts.hits + counts.misses == activations
    copied = (counts.admissions + counts.fetches) * size
    assert simulation.interconnect.moved["warm"] == counts.warmed * size == slots * size
    assert simulation.interconnect.moved["copy"] == copied
    assert simulation.interconnect.moved["read"] == (counts.misses * size if path == "read" else 0)
    assert simulation.cpu.moved["cpu"] == (counts.misses * size if path == "cpu" else 0)
    # Weights never go up: an evicted expert is dropped, its blob is still on the host.
    assert set(simulation.upward.moved) == {"routes"}
    assert simulation.upward.moved["routes"] == 4 * activations
    assert simulation.device.moved["dense"] == 25 * ROUND.dense_bytes
    read_near = activations if path == "copy" else counts.hits
    assert simulation.device.moved["experts"] == read_near * size
    assert counts.late == 0
    assert SlotState.FILLING not in simulation.residency.states
    if path == "copy":
        assert counts.fetches == counts.misses + counts.failures


@pytest.mark.parametrize("slots", [1, 3, 6, 11, 12])
@pytest.mark.parametrize("path", ["read", "cpu"])
def test_the_time_is_the_formula_where_nothing_moves(slots, path):
    """Each token takes all experts of the layers, so static slots hit exactly slots of 12."""
    found = random_trace(1, 40, chosen=4)
    simulation = simulated(found, slots, STATIC, path=path)
    counts = simulation.residency.counts
    assert (counts.hits, counts.misses) == (40 * slots, 40 * (12 - slots))
    hit_share, activations = slots / 12, 12
    near = (ROUND.dense_bytes + hit_share * activations * ROUND.expert_bytes) / ROUND.device
    rate = ROUND.interconnect if path == "read" else ROUND.cpu
    far = (1 - hit_share) * activations * ROUND.expert_bytes / rate
    waiting = 3 * ROUND.sync_ns if path == "cpu" else 0
    assert simulation.clock.now == pytest.approx(40 * (1e9 * (near + far) + waiting), rel=1e-12)
    bound = ROUND.token_ns(path, 3, counts.hits + counts.misses, counts.misses, 40)
    assert simulation.clock.now == bound


def test_the_time_is_the_formula_for_copies_on_demand():
    """Expert 0 of a layer is always hit; the other two take turns in the second slot: h = 1/2."""
    tokens = tuple(((0, 1 + at % 2),) for at in range(60))
    found = Trace(TraceHeader(layers=1, experts=4, chosen=2), tokens)
    simulation = simulated(found, 2, LRU, path="copy")
    counts = simulation.residency.counts
    assert (counts.hits, counts.misses) == (61, 59)  # the slots held 0 and 1 at the start
    near = (60 * ROUND.dense_bytes + 120 * ROUND.expert_bytes) * 10**9 // ROUND.device
    far = 59 * ROUND.expert_bytes * 10**9 // ROUND.interconnect
    assert simulation.clock.now == near + far + 60 * ROUND.sync_ns
    assert simulation.clock.now == ROUND.token_ns("copy", 1, 120, 59, 60)


def test_the_default_machine_gives_the_bounds_of_a_24_gb_card():
    """16 GiB: 148 slots, 9.2 tok/s with copies alone, 21.1 with the CPU (waiting left out)."""
    machine, activations = SimulatedMachine(sync_ns=0), 1000 * 64
    misses = activations * (256 - 148) // 256
    rates = [
        1000 * 10**9 / machine.token_ns(path, 32, activations, misses, 1000)
        for path in ("copy", "cpu")
    ]
    assert rates == pytest.approx([9.2, 21.1], abs=0.06)
    assert 10**9 / machine.token_ns("read", 32, 64, 0, 1) == pytest.approx(122, abs=0.5)


def test_copies_and_missed_reads_share_the_interconnect():
    """Four admissions (10 us each) go first; the next token's miss waits for them."""
    found = Trace(TraceHeader(layers=1, experts=8, chosen=1), (((7,),), ((6,),)))
    simulation = simulated(found, 1, PolicySettings(decay=ONE, margin=0, uploads=4))
    dense, blob = 500, 10_000
    # Token 1 reads 7 over PCIe and admits it; token 2 waits for that copy, then reads 6.
    assert simulation.clock.now == (dense + blob) + (blob + blob)
    assert simulation.residency.counts.admissions == 1


def test_an_upload_lags_as_many_tokens_as_asked_for():
    found = Trace(TraceHeader(layers=1, experts=4, chosen=1), tuple(((3,),) for _ in range(6)))
    for lag in range(4):
        simulation = simulated(found, 1, LRU, lag=lag)
        # Chosen after token 1; copied, beside the read of the same token, in token 2 + lag.
        assert simulation.residency.counts.misses == 2 + lag


def event_log(seed):
    found, log = random_trace(5, 12, skew=2.0), []
    simulated(
        found,
        7,
        PolicySettings(margin=ONE // 2, uploads=2),
        lag=1,
        faults=Faults(seed, failures=200, jitter_ns=9000),
        log=log,
    ).drain()
    return log


def test_the_same_seed_gives_the_same_events():
    assert event_log(3) == event_log(3)
    assert event_log(3) != event_log(4)
    assert any(" fail " in line for line in event_log(3))
    assert "\n".join(event_log(3)) + "\n" == EVENTS.read_text()


def hit_rate(counts):
    return counts.hits / (counts.hits + counts.misses)


def test_uniform_routing_hits_by_the_share_of_slots():
    """Independent uniform choices: whoever decides, an activation hits with k/8. The share of hits
    has at most the standard deviation of independent activations, since a layer's two differ; five
    of them are allowed.
    """
    layers, tokens = 4, 1500
    found = random_trace(11, tokens, layers=layers, experts=8)
    for name in ("heat", "lru", "lfu", "static"):
        for k in (2, 4, 6):
            policy = Policy(8 * layers, PRESETS[name])
            residency = Residency(8 * layers, k * layers, policy)
            for upload in residency.warm(policy.order(8)):
                residency.ready(upload)
            for token in found.ids():
                for upload in residency.token([e for ids in token for e in ids]):
                    residency.ready(upload)
            share, activations = k / 8, tokens * layers * 2
            deviation = (share * (1 - share) / activations) ** 0.5
            assert abs(hit_rate(residency.counts) - share) < 5 * deviation, (name, k)


def test_a_cycle_with_one_slot_too_few_does_not_collapse():
    """LRU that fills on every miss never hits; admission by heat leaves what is there."""
    found = Trace(
        TraceHeader(layers=1, experts=9, chosen=1), tuple(((at % 9,),) for at in range(900))
    )
    counts = simulated(found, 8, LRU, path="copy").residency.counts
    assert counts.hits == 8  # what the slots held at the start
    for chosen in (HEAT, LFU):
        counts = simulated(found, 8, chosen, machine=SimulatedMachine()).residency.counts
        assert hit_rate(counts) >= 0.8  # 8/9 at best
    assert simulated(found, 8, HEAT).residency.counts.admissions == 0


# Independent oracles.


def best_hits(activations, slots, experts):
    """The optimum by trying all contents, and after each miss all evictions and none."""

    @cache
    def ahead(at, held):
        if at == len(activations):
            return 0
        expert = activations[at]
        if expert in held:
            return 1 + ahead(at + 1, held)
        others = [(held - {victim}) | {expert} for victim in held]
        return max(ahead(at + 1, content) for content in [held, *others])

    return max(ahead(0, frozenset(held)) for held in combinations(range(experts), slots))


def farthest_first(activations, slots):
    """Belady's rule, written out and quadratic: keep the `slots` experts needed soonest."""

    def following(expert, start):
        for at in range(start, len(activations)):
            if activations[at] == expert:
                return at
        return len(activations)

    held = set(sorted(set(activations), key=lambda expert: following(expert, 0))[:slots])
    hits = 0
    for at, expert in enumerate(activations):
        hits += expert in held
        ranked = sorted(held | {expert}, key=lambda e: (following(e, at + 1), e not in held))
        held = set(ranked[: max(slots, len(held))])
    return hits


@given(st.lists(st.integers(0, 4), min_size=1, max_size=14), st.integers(1, 5))
def test_the_optimum_is_the_best_of_all_ways(activations, slots):
    best = best_hits(tuple(activations), slots, 5)
    assert replay.optimal_hits(activations, slots) == best
    assert farthest_first(activations, slots) == best


@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(2, 12),
    skew=st.sampled_from([0.0, 1.0, 4.0]),
    lag=st.integers(0, 2),
)
def test_no_policy_beats_the_optimum(seed, slots, skew, lag):
    found = random_trace(seed, 40, skew=skew)
    activations = [expert for token in found.ids() for ids in token for expert in ids]
    best = farthest_first(activations, slots)
    assert replay.optimum(found, slots, ROUND).hits == best
    assert simulated(found, slots, LRU, path="copy").residency.counts.hits <= best
    for chosen in PRESETS.values():
        assert simulated(found, slots, chosen, lag=lag).residency.counts.hits <= best


def test_the_tiny_models_own_routing_replayed():
    found = trace.read_trace(GOLDEN / "tiny.trace")
    machine = SimulatedMachine()  # Mixtral's sizes: copies take a token and more
    for slots in (8, 12, 16, 20):
        read, cpu, lru, best, best_cpu = replay.compare_policies(found, slots, "heat", machine)
        activations = len(found.tokens) * 3 * 2
        for row in (read, cpu, lru, best, best_cpu):
            assert row.hits + row.misses == activations
            assert row.hits <= best.hits
        assert read.interconnect_bytes == (read.misses + read.uploads) * machine.expert_bytes
        assert cpu.interconnect_bytes == cpu.uploads * machine.expert_bytes > 0
        assert (
            lru.interconnect_bytes
            == lru.uploads * machine.expert_bytes
            == lru.misses * (machine.expert_bytes)
        )
        assert best.interconnect_bytes == best.misses * machine.expert_bytes
        assert read.nanoseconds >= machine.token_ns("read", 3, activations, read.misses, 800)
        assert read.uploads_per_token < 0.2 * lru.uploads_per_token
        # Local routing: better than any placement that looks at nothing.
        assert read.hit_rate > slots / 24


def test_a_profile_fills_the_slots_of_a_static_split():
    found = trace.read_trace(GOLDEN / "tiny.trace")
    machine = SimulatedMachine()
    heat = replay.learned_heat(found, "static")
    activations = [expert for token in found.ids() for ids in token for expert in ids]
    assert heat == [activations.count(expert) * ONE for expert in range(24)]
    row = replay.replay(found, 9, STATIC, machine, name="static", heat=heat)
    assert row.hits == sum(sorted((activations.count(e) for e in range(24)), reverse=True)[:9])
    assert row.uploads == 0
    blind = replay.replay(found, 9, STATIC, machine, name="static")
    assert blind.hits < row.hits


@pytest.mark.parametrize(("slots", "path"), [(0, "read"), (13, "read"), (1, "copy")])
def test_slots_out_of_range_are_refused(slots, path):
    with pytest.raises(UsageError, match="slots"):
        replay.replay(random_trace(1, 2), slots, LRU, ROUND, name="lru", path=path)


if __name__ == "__main__":
    EVENTS.write_text("\n".join(event_log(3)) + "\n")
