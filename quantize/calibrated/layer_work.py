"""How much work the parts of a calibrated run are: what its progress counts.

Bytes that are hashed count as bytes, weights that are rounded to nearest as weights, all else in
floating-point operations, by kinds that reach different rates. Shape letters: T tokens, S window,
D hidden width, F expert width, H width of all heads, V vocabulary, K inputs and N outputs of a
matrix. Knows no files and no measurements.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qmix.config import MixtralConfig
from qmix.formats import names
from qmix.planning import quantize_cost
from qmix.planning.rounding_cost import OUTPUT_BLOCKS
from qmix.quantize.calibrated.array_memory import experts_at_once
from qmix.quantize.calibrated.options import LayerOptions
from qmix.weights.scheme import Recipe, Scheme

PASS, SOLVE, ROUND, HASH = "pass", "solve", "round", "hash"
# Seconds a unit, for kinds that were not measured yet. These and the constants below are of one
# core (AVX-512). A solve took 200 us an input of all matrices that are rounded together, and 0.65
# us a weight on a busy machine (2026-11-30), besides its arithmetic, which reached 150 GFLOP/s on a
# quiet machine and 45 on a busy one: 60 is between.
EXPECTED: Mapping[str, float] = {PASS: 1 / 70e9, SOLVE: 1 / 60e9, ROUND: 1 / 2.5e6, HASH: 1 / 5e8}
# What is done once with each number of a hidden state (norms, activations, gathering) takes as long
# as so many operations of a matmul: a third of the tiny model's expert, 2 % at true width.
_NUMBER_WORK = 400.0
_INPUT_WORK, _WEIGHT_WORK = 12e6, 39e3  # in operations
_CACHED_ROWS = 40_000  # at so many outputs a weight takes twice as long: groups leave the cache


@dataclass(frozen=True)
class LayerWork:
    """The work of one layer, for each token where T is not given.

    Attributes:
        window: S.
        device: where the layer is computed; its memory says how many experts are rounded together.
    """

    config: MixtralConfig
    options: LayerOptions
    window: int
    device: torch.device

    @property
    def _models(self) -> int:
        """The rounded model, and with correction the unrounded one beside it."""
        return 2 if self.options.correct else 1

    @property
    def _by_gradients(self) -> bool:
        return self.options.objective == "loss"

    @property
    def attention(self) -> float:
        """Of attention in one model."""
        config = self.config
        heads = config.num_attention_heads * config.head_dim
        narrow = config.num_key_value_heads * config.head_dim
        projections = 2.0 * config.hidden_size * 2 * (heads + narrow)
        scores = 4.0 * self.window * heads
        return projections + scores + _NUMBER_WORK * 2 * (config.hidden_size + heads + narrow)

    @property
    def both_attentions(self) -> float:
        """Of attention in every model that runs."""
        return self._models * self.attention

    @property
    def expert(self) -> float:
        """Of one expert."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        return 6.0 * hidden * inner + _NUMBER_WORK * (hidden + inner)

    @property
    def head(self) -> float:
        """Of the head, and of the distribution of the next token."""
        hidden, words = self.config.hidden_size, self.config.vocab_size
        return 2.0 * hidden * words + _NUMBER_WORK * (hidden + words)

    def moments(self, columns: int) -> float:
        """Of adding an input [K] to the sums that matrices are rounded by."""
        crossed = 2.0 * columns**2 if self.options.correct else 0.0
        numbers = self._models * _NUMBER_WORK * columns
        return quantize_cost.symmetric_work(columns) + crossed + numbers

    @property
    def inner_moments(self) -> float:
        """Of w1 and w3 in every model, and of the sums for w2."""
        return self._models * self.expert * 2 / 3 + self.moments(self.config.intermediate_size)

    @property
    def inner_gradients(self) -> float:
        """Of the gradients at w1 and w3 for an input [D]."""
        inner = self.config.intermediate_size
        return self.expert * 2 / 3 + 2 * quantize_cost.symmetric_work(inner)

    def solve(self, columns: int, rows: int, count: int = 1) -> float:
        """Of rounding matrices [N, K] together: factors, the greedy pass, and the rounds after."""
        each = 1 + 2 * self.options.rounding.refine + (4 if self.options.correct else 0)
        arithmetic = columns**3 / 3 + each * rows * columns**2
        weight_work = _WEIGHT_WORK * (1 + rows / _CACHED_ROWS)
        input_work = _INPUT_WORK * columns
        if self._by_gradients:
            arithmetic += rows**3 / 3 + 2 * columns * rows**2
            input_work *= OUTPUT_BLOCKS
        return input_work + count * (arithmetic + weight_work * rows * columns)

    def total(self, layer: int, tokens: int, recipe: Recipe) -> dict[str, float]:
        """Of a whole layer and T tokens, by kind."""
        base = f"model.layers.{layer}"
        qkv = [f"{base}.self_attn.{part}_proj.weight" for part in "qkv"]
        output = f"{base}.self_attn.o_proj.weight"
        passes = self.both_attentions
        if any(recipe.scheme_of(name).kind != "dense" for name in (*qkv, output)):
            heads = self.config.num_attention_heads * self.config.head_dim
            passes += self.attention + self.moments(self.config.hidden_size) + self.moments(heads)
        pairs = self.config.num_experts_per_tok
        passes += pairs * (self.moments(self.config.hidden_size) + self.inner_moments)
        passes += pairs * self._models * self.expert
        passes += pairs * self.inner_gradients if self._by_gradients else 0
        together = [[qkv], [[output]]]
        experts = [
            f"{base}.block_sparse_moe.experts.{expert}"
            for expert in range(self.config.num_local_experts)
        ]
        # Gradients of w1 and w3 differ, so these are then rounded apart.
        inner = (("w1",), ("w3",)) if self._by_gradients else (("w1", "w3"),)
        step = experts_at_once(self.config, self.options, self.device)
        for first in range(0, len(experts), step):
            some = experts[first : first + step]
            jobs = [[f"{e}.{part}.weight" for part in parts] for e in some for parts in inner]
            together += [jobs] if len(some) > 1 else [[job] for job in jobs]
            together.append([[f"{expert}.w2.weight"] for expert in some])
        shapes = {t.name: t.shape for t in names.layer_tensors(self.config, layer)}
        solves = sum(self._solves(jobs, shapes, recipe) for jobs in together)
        return {PASS: tokens * passes, SOLVE: solves}

    def _solves(
        self,
        jobs: Sequence[Sequence[str]],
        shapes: Mapping[str, tuple[int, ...]],
        recipe: Recipe,
    ) -> float:
        """Of rounding jobs together, each a list of matrices with the same inputs."""
        batches = Counter(
            (scheme, tuple(shapes[name] for name in members))
            for job in jobs
            for scheme, members in schemes_of(job, recipe).items()
            if scheme.kind != "dense"
        )
        return sum(
            self.solve(members[0][1], sum(rows for rows, _ in members), count)
            for (_, members), count in batches.items()
        )

    def totals(self, layers: Sequence[int], tokens: int, recipe: Recipe) -> dict[str, float]:
        """Of several layers."""
        each = [self.total(layer, tokens, recipe) for layer in layers]
        return {kind: sum(work[kind] for work in each) for kind in (PASS, SOLVE)}

    def pass_only(self, tokens: int) -> dict[str, float]:
        """Of T tokens through a layer that was rounded before."""
        pairs = self.config.num_experts_per_tok
        return {PASS: tokens * (self.both_attentions + pairs * self._models * self.expert)}


def schemes_of(matrices: Sequence[str], recipe: Recipe) -> dict[Scheme, list[str]]:
    """Matrices with the same inputs by scheme; those of one scheme are rounded together."""
    schemes: dict[Scheme, list[str]] = {}
    for name in matrices:
        schemes.setdefault(recipe.scheme_of(name), []).append(name)
    return schemes
