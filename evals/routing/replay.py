"""A trace replayed through a policy: hits, bytes and time, beside LRU and the optimum.

LRU fills a slot on every miss. Sizes and rates come with the simulated machine. Knows nothing of
models.
"""

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qmix.errors import UsageError
from qmix.evals.routing.simulation import SECOND, MissPath, SimulatedMachine, Simulation
from qmix.evals.routing.trace import Trace
from qmix.experts.policy import LFU, LRU, PRESETS, Policy, PolicyName, PolicySettings
from qmix.experts.residency import Residency


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A trace replayed through one policy.

    Attributes:
        path: what a miss does; see `Simulation`.
        uploads: copies into slots, without those before the first token.
        interconnect_bytes: bytes over PCIe into the device, without those before the first token.
        nanoseconds: simulated time of all tokens.
    """

    name: str
    path: MissPath
    tokens: int
    hits: int
    misses: int
    uploads: int
    interconnect_bytes: int
    nanoseconds: int

    @property
    def hit_rate(self) -> float:
        return self.hits / (self.hits + self.misses)

    @property
    def uploads_per_token(self) -> float:
        return self.uploads / self.tokens

    @property
    def interconnect_bytes_per_token(self) -> float:
        return self.interconnect_bytes / self.tokens

    @property
    def tokens_per_s(self) -> float:
        return self.tokens * SECOND / self.nanoseconds

    def to_dict(self) -> dict[str, Any]:
        """The replay as a JSON document."""
        return {
            **asdict(self),
            "hit_rate": round(self.hit_rate, 6),
            "uploads_per_token": round(self.uploads_per_token, 6),
            "interconnect_bytes_per_token": round(self.interconnect_bytes_per_token),
            "tokens_per_s": round(self.tokens_per_s, 3),
        }


def replay(
    trace: Trace,
    slots: int,
    settings: PolicySettings,
    machine: SimulatedMachine,
    *,
    name: str,
    path: MissPath = "read",
    heat: Sequence[int] | None = None,
) -> Replay:
    """Decode the tokens of a trace on a simulated machine.

    Args:
        slots: number of experts that fit the device.
        name: of the policy.
        heat: the slots are first filled with the hottest experts; by default with some of each
            layer.

    Raises:
        UsageError: too few slots, or more slots than experts.
    """
    layers, experts = trace.header.layers, trace.header.experts
    fewest = trace.header.chosen if path == "copy" else 1
    if not fewest <= slots <= layers * experts:
        raise UsageError(
            "out of range", where="slots", expected=f"{fewest} to {layers * experts}", found=slots
        )
    policy = Policy(layers * experts, settings, heat=heat)
    residency = Residency(layers * experts, slots, policy)
    simulation = Simulation(residency, machine, path=path)
    simulation.warm(policy.order(experts))
    for token in trace.ids():
        simulation.token(token)
    counts, moved = residency.counts, simulation.interconnect.moved
    return Replay(
        name=name,
        path=path,
        tokens=counts.tokens,
        hits=counts.hits,
        misses=counts.misses,
        uploads=counts.admissions + counts.fetches,
        interconnect_bytes=moved["copy"] + moved["read"],
        nanoseconds=simulation.clock.now,
    )


def optimum(
    trace: Trace, slots: int, machine: SimulatedMachine, *, path: MissPath = "read"
) -> Replay:
    """Belady's algorithm, which knows the future and keeps what is used soonest.

    It starts with full slots, may skip an expert and pays for no upload, so no policy that loads
    its misses has more hits. (L. A. Belady, IBM Systems Journal 5(2), 1966; with bypassing.)
    """
    activations = [expert for token in trace.ids() for ids in token for expert in ids]
    hits = optimal_hits(activations, slots)
    misses, tokens = len(activations) - hits, len(trace.tokens)
    return Replay(
        name="belady",
        path=path,
        tokens=tokens,
        hits=hits,
        misses=misses,
        uploads=0,
        interconnect_bytes=0 if path == "cpu" else misses * machine.expert_bytes,
        nanoseconds=machine.token_ns(path, trace.header.layers, len(activations), misses, tokens),
    )


def optimal_hits(activations: Sequence[int], slots: int) -> int:
    """The most hits that `slots` slots allow, whatever fills them before the first activation."""
    assert slots > 0, slots
    never = len(activations)
    following, next_use = [never] * never, dict[int, int]()
    for index in reversed(range(never)):
        following[index] = next_use.get(activations[index], never)
        next_use[activations[index]] = index
    # The slots start with the experts that are needed first.
    in_slots = dict(sorted(next_use.items(), key=lambda item: item[1])[:slots])
    farthest = [(-use, expert) for expert, use in in_slots.items()]
    heapq.heapify(farthest)
    hits = 0
    for index, expert in enumerate(activations):
        if expert in in_slots:
            hits += 1
        else:
            while in_slots.get(farthest[0][1]) != -farthest[0][0]:
                heapq.heappop(farthest)  # outdated: its next use has changed, or it was evicted
            if -farthest[0][0] <= following[index]:
                continue  # everything in the slots is needed sooner
            del in_slots[heapq.heappop(farthest)[1]]
        in_slots[expert] = following[index]
        heapq.heappush(farthest, (-following[index], expert))
    return hits


def learned_heat(trace: Trace, policy_name: PolicyName) -> list[int]:
    """The heat that a policy would have learned from a trace.

    The static policy learns nothing; for it the uses are counted.
    """
    settings = LFU if policy_name == "static" else PRESETS[policy_name]
    policy = Policy(trace.header.layers * trace.header.experts, settings)
    for token in trace.ids():
        policy.used(expert for ids in token for expert in ids)
    return policy.heat


def compare_policies(
    trace: Trace,
    slots: int,
    policy: PolicyName,
    machine: SimulatedMachine,
    *,
    heat: Sequence[int] | None = None,
) -> tuple[Replay, ...]:
    """The policy with misses read in place and on the CPU, LRU, and the optimum for both."""
    settings = PRESETS[policy]
    return (
        replay(trace, slots, settings, machine, name=policy, heat=heat),
        replay(trace, slots, settings, machine, name=policy, path="cpu", heat=heat),
        replay(trace, slots, LRU, machine, name="lru", path="copy", heat=heat),
        optimum(trace, slots, machine),
        optimum(trace, slots, machine, path="cpu"),
    )
