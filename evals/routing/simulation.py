"""A simulated decoder: clock, tiers and bytes in integers, around the real Residency.

Times are nanoseconds, rates bytes a second. A tier moves one request at a time, in the order of the
requests; copies into slots and reads of missed experts share the interconnect. Knows ids and sizes,
but no tensors.

Letters of the formulas: A activations of experts in a token, S bytes of an expert, D dense bytes of
a token, m share of misses, B rates (g device, p interconnect, c CPU), t_s waiting time of a layer.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from qmix.experts.residency import Residency, Upload

SECOND = 10**9

MissPath = Literal["read", "cpu", "copy"]


class SimClock:
    """A clock that advances only on request, and the actions that are due."""

    def __init__(self) -> None:
        self.now = 0
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0

    def at(self, when: int, action: Callable[[], None]) -> None:
        """Call `action` at a time; actions of one time are called in the order of these calls."""
        assert when >= self.now, (when, self.now)
        self._order += 1
        heapq.heappush(self._due, (when, self._order, action))

    def advance(self, until: int) -> None:
        """Advance to `until`, calling the actions that become due on the way."""
        assert until >= self.now, (until, self.now)
        while self._due and self._due[0][0] <= until:
            self.now, _, action = heapq.heappop(self._due)
            action()
        self.now = until


class SimTier:
    """A memory or connection that moves bytes, one request after another.

    Attributes:
        moved: bytes by purpose.
        free_at: the time at which all requests will have been moved.
    """

    def __init__(self, clock: SimClock, bandwidth: int, latency_ns: int = 0) -> None:
        assert bandwidth > 0, bandwidth
        self.clock, self.bandwidth, self.latency_ns = clock, bandwidth, latency_ns
        self.moved: Counter[str] = Counter()
        self.free_at = 0

    def move(self, purpose: str, nbytes: int, *, extra_ns: int = 0) -> int:
        """Queue a request; returns its end, ceil(bytes / bandwidth) + latency after it begins."""
        if not nbytes:
            return self.clock.now
        self.moved[purpose] += nbytes
        begin = max(self.clock.now, self.free_at)
        self.free_at = begin - (-nbytes * SECOND // self.bandwidth) + self.latency_ns + extra_ns
        return self.free_at


@dataclass(frozen=True, kw_only=True)
class SimulatedMachine:
    """Sizes and rates; by default Mixtral-8x7B at 4.25 bits a weight on a 24 GB card with PCIe 4.

    850 GB/s is the highest measured read rate of an RTX 3090, 25 GB/s that of a pinned copy, and
    60 GB/s that of a desktop's DDR5 memory in a 4-bit matmul.

    Attributes:
        expert_bytes: S.
        dense_bytes: D.
        device, interconnect, cpu: B_g, B_p, B_c in bytes a second.
        latency_ns: of each request on the interconnect.
        sync_ns: t_s, the waiting time of a layer in which the host takes part.
    """

    expert_bytes: int = 3 * 4096 * 14336 * 17 // 32
    dense_bytes: int = 980_000_000
    device: int = 850 * 10**9
    interconnect: int = 25 * 10**9
    cpu: int = 60 * 10**9
    latency_ns: int = 0
    sync_ns: int = 80_000

    def token_ns(
        self, path: MissPath, layers: int, activations: int, misses: int, tokens: int
    ) -> int:
        """The least time of decoding without any copies in the background.

        read: (D + (1 - m) A S) / B_g + m A S / B_p
        cpu: (D + (1 - m) A S) / B_g + m A S / B_c + layers t_s
        copy: (D + A S) / B_g + m A S / B_p + layers t_s

        Args:
            activations, misses: of all tokens together.
        """
        on_device = activations if path == "copy" else activations - misses
        near = tokens * self.dense_bytes + on_device * self.expert_bytes
        rate = self.cpu if path == "cpu" else self.interconnect
        waiting = 0 if path == "read" else tokens * layers * self.sync_ns
        far = misses * self.expert_bytes * SECOND // rate
        return near * SECOND // self.device + far + waiting


@dataclass(frozen=True)
class Faults:
    """Faults of copies: `failures` in a thousand fail, and each is late by up to `jitter_ns`."""

    seed: int = 0
    failures: int = 0
    jitter_ns: int = 0


class Simulation:
    """Decodes the tokens of a trace one by one.

    Args:
        path: what a miss does. read: the device reads the expert over PCIe. cpu: the host
            multiplies it. copy: it is first copied into a slot (Residency.fetch).
        lag: whole tokens between the choice of an upload and the beginning of its copy.
        log: receives a line for every event: time, event, numbers.
    """

    def __init__(
        self,
        residency: Residency,
        machine: SimulatedMachine,
        *,
        path: MissPath = "read",
        lag: int = 0,
        faults: Faults | None = None,
        log: list[str] | None = None,
    ) -> None:
        self.residency, self.machine, self.path, self.lag = residency, machine, path, lag
        self.clock = SimClock()
        self.device = SimTier(self.clock, machine.device)
        self.interconnect = SimTier(self.clock, machine.interconnect, machine.latency_ns)
        self.upward = SimTier(self.clock, machine.interconnect)
        self.cpu = SimTier(self.clock, machine.cpu)
        self._faults = faults or Faults()
        self._random = Random(self._faults.seed)
        self._waiting: deque[tuple[Upload, ...]] = deque()
        self._landed: list[tuple[Upload, bool]] = []
        self._log = log

    def warm(self, order: Sequence[int]) -> None:
        """Fill the slots before the first token; this takes no time, but its bytes count."""
        for upload in self.residency.warm(order):
            self.interconnect.moved["warm"] += self.machine.expert_bytes
            self._note("warm", upload)
            self.residency.ready(upload)

    def token(self, layers: Sequence[Sequence[int]]) -> None:
        """Decode a token with the experts of each layer, by their ids over all layers."""
        self._wait(self.device.move("dense", self.machine.dense_bytes))
        for ids in layers:
            self._layer(list(dict.fromkeys(ids)))
        used = [expert for ids in layers for expert in ids]
        self.upward.moved["routes"] += 4 * len(used)
        uploads = self.residency.token(used)
        counts = self.residency.counts
        self._note(f"token {counts.tokens} hits {counts.hits} misses {counts.misses}")
        self._publish()
        self._waiting.append(uploads)
        if len(self._waiting) > self.lag:
            self._begin(self._waiting.popleft())

    def drain(self) -> None:
        """Begin every copy that was chosen, and wait for all of them."""
        while self._waiting:
            self._begin(self._waiting.popleft())
        self._wait(max(self.interconnect.free_at, self.clock.now))
        self._publish()

    def _layer(self, ids: list[int]) -> None:
        size, residency = self.machine.expert_bytes, self.residency
        if self.path == "copy":
            for expert in ids:
                self._fetch(expert, ids)
        missed = sum(residency.slot_of_id[expert] < 0 for expert in ids)
        self._wait(self.device.move("experts", (len(ids) - missed) * size))
        tier = self.cpu if self.path == "cpu" else self.interconnect
        for _ in range(missed):
            self._wait(tier.move(self.path, size))
        if self.path != "read":
            self._wait(self.clock.now + self.machine.sync_ns)

    def _fetch(self, expert: int, needed: list[int]) -> None:
        upload = self.residency.fetch(expert, needed)
        while upload is not None:
            self._note("fetch", upload)
            self._wait(
                self.interconnect.move("copy", self.machine.expert_bytes, extra_ns=self._delay_ns())
            )
            if self._succeeds():
                self.residency.ready(upload)
                return
            self._note("fail", upload)
            self.residency.failed(upload)
            upload = self.residency.fetch(expert, needed)

    def _begin(self, uploads: Sequence[Upload]) -> None:
        for upload in uploads:
            self._note("copy", upload)
            end = self.interconnect.move(
                "copy", self.machine.expert_bytes, extra_ns=self._delay_ns()
            )
            self.clock.at(end, partial(self._land, upload))

    def _land(self, upload: Upload) -> None:
        success = self._succeeds()
        self._note("land" if success else "fail", upload)
        self._landed.append((upload, success))

    def _publish(self) -> None:
        """At the end of a token: make the copies that have arrived visible."""
        landed, self._landed = self._landed, []
        for upload, success in landed:
            if success:
                self.residency.ready(upload)
            else:
                self.residency.failed(upload)

    def _delay_ns(self) -> int:
        return self._random.randint(0, self._faults.jitter_ns)

    def _succeeds(self) -> bool:
        return self._random.randrange(1000) >= self._faults.failures

    def _wait(self, until: int) -> None:
        self.clock.advance(until)

    def _note(self, event: str, upload: Upload | None = None) -> None:
        if self._log is not None:
            details = (
                f" expert {upload.expert} slot {upload.slot} generation {upload.generation}"
                if upload
                else ""
            )
            self._log.append(f"{self.clock.now} {event}{details}")
