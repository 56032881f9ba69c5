"""A trace through a policy: hits, bytes and time, beside LRU that fills on every miss and the optimum.

Knows no model: sizes and rates come with the Machine.
"""

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qmix.errors import UsageError
from qmix.evals.routing.simulation import SECOND, Machine, MissPath, Simulation
from qmix.evals.routing.trace import Trace
from qmix.experts.policy import LFU, LRU, PRESETS, Policy, PolicyName, PolicySettings
from qmix.experts.residency import Residency


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One policy's way through a trace.

    Attributes:
        uploads: copies into slots, those before the first token left out.
        interconnect_bytes: over PCIe into the device, without those either.
        nanoseconds: simulated, all tokens.
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
        """As a JSON document."""
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
    machine: Machine,
    *,
    name: str,
    path: MissPath = "read",
    heat: Sequence[int] | None = None,
) -> Replay:
    """Decode the trace's tokens on a simulated machine, slots filled beforehand by `heat`, else in turn
    over the layers.

    Raises:
        UsageError: too few slots, or more than there are experts.
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


def optimum(trace: Trace, slots: int, machine: Machine, *, path: MissPath = "read") -> Replay:
    """Belady's: knows the future, keeps what is used soonest, starts with the best of all slots filled.

    It may pass an expert by and pays for no upload, so no policy that loads what was missed has more
    hits. (L. A. Belady, IBM Systems Journal 5(2), 1966; with bypassing.)
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
    """The most hits that `slots` slots can have, filled with anything before the first activation."""
    assert slots > 0, slots
    never = len(activations)
    following, next_activation = [never] * never, dict[int, int]()
    for at in reversed(range(never)):
        following[at] = next_activation.get(activations[at], never)
        next_activation[activations[at]] = at
    # At the start the slots hold what is asked for first.
    held = dict(sorted(next_activation.items(), key=lambda item: item[1])[:slots])
    farthest = [(-at, expert) for expert, at in held.items()]
    heapq.heapify(farthest)
    hits = 0
    for at, expert in enumerate(activations):
        if expert in held:
            hits += 1
        else:
            while held.get(farthest[0][1]) != -farthest[0][0]:
                heapq.heappop(farthest)  # its next activation has moved, or it has gone
            if -farthest[0][0] <= following[at]:
                continue  # all that is held is needed sooner
            del held[heapq.heappop(farthest)[1]]
        held[expert] = following[at]
        heapq.heappush(farthest, (-following[at], expert))
    return hits


def heat_of(trace: Trace, policy: PolicyName) -> list[int]:
    """What the policy would have learned from a trace; static, which learns nothing, counts uses."""
    found = Policy(
        trace.header.layers * trace.header.experts, LFU if policy == "static" else PRESETS[policy]
    )
    for token in trace.ids():
        found.used(expert for ids in token for expert in ids)
    return found.heat


def compare(
    trace: Trace,
    slots: int,
    policy: PolicyName,
    machine: Machine,
    *,
    heat: Sequence[int] | None = None,
) -> tuple[Replay, ...]:
    """The policy with misses read in place and with misses on the CPU, LRU, and the optimum."""
    settings = PRESETS[policy]
    return (
        replay(trace, slots, settings, machine, name=policy, heat=heat),
        replay(trace, slots, settings, machine, name=policy, path="cpu", heat=heat),
        replay(trace, slots, LRU, machine, name="lru", path="copy", heat=heat),
        optimum(trace, slots, machine),
        optimum(trace, slots, machine, path="cpu"),
    )
