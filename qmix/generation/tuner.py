"""Tuner: which StepTuning a model's decode step runs with, from the user's file or from a search.

The first step on a card searches, for at most 20 s, and says so; QMIX_TUNE=0 takes the defaults and
searches never. Knows a model's shapes, and trials only as something to search with.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TextIO

import torch

from qmix.errors import ResourceError, UnsupportedError, WriteError
from qmix.generation.packed_layers import layer_weights
from qmix.generation.step_trials import StepTrials
from qmix.kernels.gpu import probe
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning
from qmix.kernels.moe import DECODE_TOKENS
from qmix.nn.decoder import Decoder
from qmix.nn.linear import Linear
from qmix.planning import machine
from qmix.tuning import axes, cache_file
from qmix.tuning.cache_file import Entry, TuningKey
from qmix.tuning.device_clock import CudaClock
from qmix.tuning.search import DeviceLostError, Search, Trials
from qmix.tuning.switch import VARIABLE, is_wanted

SECONDS = 20.0  # of a search that nobody asked for
FULL_SECONDS = 180.0
# A step is tuned for so many rows; one of fewer rows takes the choices of the next.
BATCHES = (1, 8, DECODE_TOKENS)

MakeTrials = Callable[[Decoder, Linear, int], Trials[StepTuning]]


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        entry: as it is kept.
        rejected: what was wrong with other candidates.
    """

    tuning: StepTuning
    entry: Entry
    rejected: Mapping[StepTuning, str]


class StepTuner(Protocol):
    """Says how a step is launched."""

    def of(self, model: Decoder, head: Linear, batch: int) -> StepTuning:
        """The tuning of a step with `batch` rows."""


class Tuner:
    """The tunings of one model, each looked up or searched for once.

    Args:
        path: of the file; None: the user's.
        make_trials: what a search measures with.
        stream: where a search is announced.
        clock: of the search, in seconds.
    """

    def __init__(
        self,
        *,
        path: Path | None = None,
        make_trials: MakeTrials | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._make_trials, self._clock = path, make_trials or _trials, clock
        self._stream = stream
        self._known: dict[tuple[object, ...], StepTuning] = {}

    def of(self, model: Decoder, head: Linear, batch: int) -> StepTuning:
        """The tuning of a step with `batch` rows.

        A model whose experts are offloaded takes what the file says, and is not searched with.

        Raises:
            UsageError: QMIX_TUNE has an unknown value.
            ResourceError: the device was lost in a search.
        """
        device = model.norm.weight.device
        rows = rows_for(batch)
        if not is_wanted() or rows is None or device.type != "cuda":
            return UNTUNED
        known = (rows, device, model.norm.weight.dtype)
        if known not in self._known:
            key = key_of(model, rows, device)
            tuning = self._saved(key)
            if tuning is None and model.experts_store is None:
                tuning = self._searched(model, head, rows, key)
            self._known[known] = tuning or UNTUNED
        return self._known[known]

    def _searched(
        self, model: Decoder, head: Linear, rows: int, key: TuningKey
    ) -> StepTuning | None:
        """What a search finds; None, with a warning, where nothing can be timed."""
        try:
            return self.search(model, head, rows, key).tuning
        except UnsupportedError as error:
            warnings.warn(f"the defaults are used: {error}", stacklevel=6)
            return None

    def _saved(self, key: TuningKey) -> StepTuning | None:
        """What the file says; a file that cannot be believed is told once."""
        saved = cache_file.load(self._path)
        if saved.trouble is not None:
            warnings.warn(f"tunings are searched for again: {saved.trouble}", stacklevel=6)
        entry = saved.of(key)
        if entry is None:
            return None
        try:
            return axes.from_json(entry.tuning)
        except ValueError:  # another version's, or written by hand
            return None

    def search(
        self, model: Decoder, head: Linear, rows: int, key: TuningKey, *, full: bool = False
    ) -> Found:
        """Search, and save what is found, however the search ends.

        Raises:
            ResourceError: a candidate took the device with it.
            UnsupportedError: neither the defaults nor separate launches could be timed.
        """
        seconds = FULL_SECONDS if full else SECONDS
        with _announced(self._stream or sys.stderr, key, rows, seconds) as show:
            try:
                trials = self._make_trials(model, head, rows)
            except RuntimeError as error:  # no memory for a cache of its own
                raise _untimed(key, str(error).partition("\n")[0]) from error
            search = Search(
                (UNTUNED, axes.SEPARATE),
                axes.axes(full=full),
                trials,
                seconds=seconds,
                clock=self._clock,
                on_trial=lambda passed: show(passed, len(search.outcomes) + len(search.rejected)),
            )
            complete = False
            try:
                search.run()
                complete = True
            except DeviceLostError as error:
                raise ResourceError(
                    "the GPU does not answer since a launch was tried",
                    where=key.gpu,
                    found=list(search.rejected.values())[-1],
                    remedy="Start again: what was found before is kept, or QMIX_TUNE=0 takes the "
                    "defaults.",
                ) from error
            finally:
                entry = self._kept(key, search, complete=complete)
        if entry is None:
            raise _untimed(key, search.rejected[search.start])
        return Found(search.best, entry, search.rejected)

    def _kept(self, key: TuningKey, search: Search[StepTuning], *, complete: bool) -> Entry | None:
        """The best, saved; None if nothing at all was measured."""
        if search.start not in search.outcomes or search.best not in search.outcomes:
            return None
        if search.start != UNTUNED:
            why = search.rejected[UNTUNED]
            warnings.warn(f"decode steps take more launches, as fewer fail: {why}", stacklevel=7)
        entry = Entry(
            key=key,
            tuning=axes.to_json(search.best),
            microseconds=search.outcomes[search.best].microseconds,
            untuned=search.outcomes[search.start].microseconds,
            complete=complete,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            cache_file.save(entry, self._path)
        except WriteError as error:
            warnings.warn(f"the next run searches again: {error}", stacklevel=7)
        return entry


def _untimed(key: TuningKey, why: str) -> UnsupportedError:
    return UnsupportedError("no decode step could be timed", where=key.gpu, found=why)


def rows_for(batch: int) -> int | None:
    """The number of rows whose choices a step with `batch` rows takes; None: the defaults."""
    return next((rows for rows in BATCHES if batch <= rows), None)


def key_of(model: Decoder, rows: int, device: torch.device) -> TuningKey:
    """What a tuning of this model's step is kept by."""
    card = probe.card(torch.device("cuda", device.index or 0))
    drivers = (gpu.driver for gpu in machine.gpus() if gpu.name == card.name)
    return TuningKey(
        gpu=card.name,
        capability="{}.{}".format(*card.capability),
        driver=next(drivers, "unknown"),
        triton=card.triton or "none",
        kernels=cache_file.kernel_hash(),
        shapes=shapes_of(model, rows),
    )


def shapes_of(model: Decoder, rows: int) -> str:
    """Whatever of a model's step a launch depends on."""
    config, weights = model.config, layer_weights(model.layers[0])
    assert weights is not None
    table = weights.experts.table
    projections = weights.projections or ()
    formats = [each.format for each in (*projections, *table.gate_up, *table.down)]
    ordered = (*(each.perm for each in projections), table.perm)
    return (
        f"{config.hidden_size}x{config.intermediate_size}, "
        f"{config.num_experts_per_tok} of {config.num_local_experts} experts, "
        f"{config.num_attention_heads}/{config.num_key_value_heads} heads of {config.head_dim}, "
        f"{' / '.join(map(str, formats))}{', act-order' if any(p is not None for p in ordered) else ''}, "
        f"{str(model.norm.weight.dtype).removeprefix('torch.')}, {rows} rows"
        + ("" if model.kv == "16" else f", {model.kv} cache")
    )


def _trials(model: Decoder, head: Linear, rows: int) -> Trials[StepTuning]:
    return StepTrials(model, head, rows, CudaClock(model.norm.weight.device))


@contextmanager
def _announced(
    stream: TextIO, key: TuningKey, rows: int, seconds: float
) -> Iterator[Callable[[float, int], None]]:
    """Yield show(seconds passed, trials): a line that is written over on a terminal, else one."""
    what = f"qmix: tuning for this card, once: {key.gpu}, {rows} row{'s' * (rows > 1)}"
    how = f"at most {seconds:.0f} s; {VARIABLE}=0 takes the defaults"
    is_terminal = stream.isatty()
    if not is_terminal:
        stream.write(f"{what} ({how})\n")
        stream.flush()

    def show(passed: float, trials: int) -> None:
        if is_terminal:
            stream.write(f"\r{what}: {trials} tried, {passed:.0f} s ({how})\x1b[K")
            stream.flush()

    try:
        yield show
    finally:
        if is_terminal:
            stream.write("\r\x1b[K")
            stream.flush()
