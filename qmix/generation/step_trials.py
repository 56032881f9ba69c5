"""StepTrials: a model's own decode step, run and timed with one tuning after another.

The first layers stand for all. Knows what a step is, and nothing of what a tuning says.
"""

import copy
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qmix.generation.static_decoder import RotaryTables, StaticDecoder
from qmix.kernels.gpu.compile_ahead import compiling_ahead
from qmix.kernels.gpu.current_device import on
from qmix.kernels.gpu.step_tuning import StepTuning
from qmix.kernels.kv_rows import fill_randomly
from qmix.nn.cache import KVCache
from qmix.nn.decoder import Decoder
from qmix.nn.linear import Linear
from qmix.tuning import axes
from qmix.tuning.device_clock import DeviceClock
from qmix.tuning.search import DeviceLostError, Outcome

# The chosen experts of one layer partly stay in the second-level cache; those of four do not.
_LAYERS = 4
_DEPTH = 1024  # columns in the cache, the cost of attention in a chat


@dataclass(frozen=True)
class Rounds:
    """How often a step runs: so many rounds of so many steps; the median of the rounds counts."""

    steps: int = 8
    rounds: int = 5


_ROUNDS = Rounds()


class StepTrials:
    """Trials of a step with `batch` rows.

    Args:
        record: as StaticDecoder's; False, for the interpreter, compiles nothing ahead either.
    """

    def __init__(
        self,
        model: Decoder,
        head: Linear,
        batch: int,
        clock: DeviceClock,
        *,
        rounds: Rounds = _ROUNDS,
        record: bool = True,
    ) -> None:
        self._model, self._head = _first_layers(model), head
        self._clock, self._rounds, self._record = clock, rounds, record
        weight = model.norm.weight
        self._depth = min(_DEPTH, model.config.max_position_embeddings - rounds.steps)
        self._cache = KVCache(
            self._model.config.replace(num_hidden_layers=len(self._model.layers)),
            batch,
            dtype=weight.dtype,
            device=weight.device,
            capacity=self._depth + rounds.steps,
            kv=model.kv,
        )
        # A generator of their own: what the user seeded goes on as without a search.
        generator = torch.Generator(weight.device).manual_seed(0)
        for layer in range(len(self._cache)):
            for stored in self._cache.storage(layer):
                fill_randomly(stored, generator)
        self._cache.advance(self._depth)
        vocabulary = model.embed_tokens.num_embeddings
        shape = (rounds.steps, batch)
        self._ids = torch.randint(vocabulary, shape, generator=generator, device=weight.device)
        self._rotary = RotaryTables()
        self._expected: Tensor | None = None

    def prepare(self, candidates: Sequence[StepTuning]) -> None:
        """Compile the kernels of all candidates side by side; whatever fails fails again later."""
        if not self._record:
            return
        with (
            suppress(Exception),
            on(self._ids.device),
            torch.inference_mode(False),
            torch.no_grad(),
            compiling_ahead(),
        ):
            for candidate in candidates:
                with suppress(Exception):
                    self._decoder(candidate, record=False).step(self._ids[0])

    def measure(self, candidate: StepTuning) -> Outcome:
        """Microseconds of a step, and how far its logits are from those of separate launches.

        Raises:
            DeviceLostError: the device answers to nothing any more.
            RuntimeError: the same step gave other bits a second time; or what a launch raised.
        """
        try:
            with on(self._ids.device), torch.inference_mode(False), torch.no_grad():
                return self._measured(candidate)
        except Exception as error:
            if not self._answers():
                raise DeviceLostError from error
            raise

    def _measured(self, tuning: StepTuning) -> Outcome:
        if self._expected is None:
            self._expected = self._run(self._decoder(axes.SEPARATE))
        decoder = self._decoder(tuning)
        logits = self._run(decoder)
        rounds = self._rounds
        times = [
            self._clock.microseconds(lambda: self._run(decoder)) / rounds.steps
            for _ in range(rounds.rounds)
        ]
        if not torch.equal(self._run(decoder), logits):
            raise RuntimeError("the same step gave other bits a second time")
        return Outcome(statistics.median(times), _difference(logits, self._expected))

    def _decoder(self, tuning: StepTuning, *, record: bool = True) -> StaticDecoder:
        return StaticDecoder(
            self._model,
            self._head,
            self._cache,
            record=record and self._record,
            tuning=tuning,
            rotary=self._rotary,
        )

    def _run(self, decoder: StaticDecoder) -> Tensor:
        """Decode some positions: the logits of all of them, float32 [steps, B, V]."""
        decoder.seek(self._depth)
        return torch.stack([decoder.step(ids).clone() for ids in self._ids])

    def _answers(self) -> bool:
        """Whether the device still computes: after some errors nothing does."""
        try:
            self._clock.synchronize()
            return bool(torch.zeros(1, device=self._ids.device).add_(1).item() == 1)
        except RuntimeError:
            return False


def _first_layers(model: Decoder) -> Decoder:
    """The model with its first layers only, which are the model's own."""
    view = copy.copy(model)
    layers = nn.ModuleList(list(model.layers)[:_LAYERS])
    view.__dict__["_modules"] = {**model._modules, "layers": layers}
    return view


def _difference(logits: Tensor, expected: Tensor) -> float:
    """How far logits [steps, B, V] are from what is expected, of the row that is farthest.

    Relative to the norm, and the median of a row's steps: where two experts' scores are nearly
    equal, a rounding chooses the other one, and the logits of that step are others. Infinite where
    one is not finite.
    """
    if not bool(torch.isfinite(logits).all()):
        return float("inf")
    norms = expected.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    ratios = (logits - expected).norm(dim=-1) / norms
    return float(ratios.median(dim=0).values.max())
