"""What rounding each group of weights costs: the divergence of the next token's distribution.

The groups of a layer are q, k and v; o; w1 and w3 of an expert; w2 of an expert. Each group is
rounded alone under every scheme, and the change of its block's output is measured. What such a
change costs in the end, KL(exact || changed) of the next token, is measured once a layer for four
kinds of change: qkv, o, all w1 and w3, and all w2. For each of them a copy of the tokens, changed
there, runs through the rest of the model beside the exact tokens. A group's loss is its own change
times the cost of a change of its kind in its layer.

The relative change of the residual stream alone is not enough: on the tiny model an equal change
costs 0.3 in one layer and 5 in the next (evals/LOG.md). Shape letters: W windows, S window, D
hidden width, n tokens of an expert. Knows the checkpoint, but no other files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.formats import Checkpoint, names
from qmix.formats.names import ModelTensor
from qmix.nn.attention import Attention, ForwardContext
from qmix.nn.embedding import embedding
from qmix.nn.linear import Linear, RMSNorm
from qmix.nn.moe import ACTIVATIONS
from qmix.quantize.calibrated.bit_allocation import Choices, QuantGroup
from qmix.quantize.calibrated.layer_work import EXPECTED, PASS, ROUND, LayerWork
from qmix.quantize.calibrated.options import LayerOptions
from qmix.quantize.calibrated.token_stream import BATCH_TOKENS
from qmix.quantize.calibrated.windows import thinned
from qmix.quantize.output_checkpoint import read_finite
from qmix.quantize.rounding import rtn
from qmix.weights.dense import Dense, Weight
from qmix.weights.scheme import Scheme
from qmix.work_meter import WorkMeter

_TOKENS = 32768  # 0.5 GB of float32 at D = 4096
_COPIED_TOKENS = 8192
_ALL_COPIED_TOKENS = 1 << 18  # in all copies: 4.3 GB; 2048 in each of Mixtral-8x7B's 128


@dataclass(frozen=True)
class _OutputChange:
    """The mean squared change of a block's output by rounding a group, under each scheme."""

    tensors: tuple[ModelTensor, ...]
    squares: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class _ExpertRun:
    """One expert on its tokens.

    Attributes:
        token: int64 [n], which tokens they are.
        x, score: its inputs [n, D] and their routing weights [n, 1].
        weights: exact w1, w2 and w3 by name, in this order.
        output: what it adds to its tokens, [n, D].
    """

    token: Tensor
    x: Tensor
    score: Tensor
    weights: dict[str, Dense]
    output: Tensor


class Sensitivity:
    """Measures the groups of a checkpoint, a layer at a time, with one expert in memory.

    Args:
        ids: int64 (W, S). Evenly chosen windows of 32768 tokens are used, fewer in the copies.
        choices: the schemes that are measured.
        attention: whether the attention's matrices will be quantized.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Tensor,
        choices: Choices,
        *,
        attention: bool,
        device: torch.device,
    ) -> None:
        self._checkpoint, self._config = checkpoint, checkpoint.config
        self._with_attention, self._device = attention, device
        self._schemes, self._typical = choices.schemes, choices.schemes.index(choices.typical)
        self._ids = thinned(ids, _TOKENS)
        copied = min(_COPIED_TOKENS, _ALL_COPIED_TOKENS // (4 * self._config.num_hidden_layers))
        # The first windows are copied; every window is as good as another.
        self._copied = max(1, min(len(self._ids), copied // ids.shape[1]))
        self._tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
        self._work = LayerWork(checkpoint.config, LayerOptions(), ids.shape[1], device)
        self._meter, self._what = WorkMeter(EXPECTED), ""

    def work(self) -> dict[str, float]:
        """How much there is to measure, by the kinds of layer_work."""
        config, each = self._config, self._work
        tokens, copied = self._ids.numel(), self._copied * self._ids.shape[1]
        pairs, new = config.num_experts_per_tok, 2 if self._with_attention else 0
        schemes = len(self._schemes)
        elements = config.num_local_experts * 3 * config.hidden_size * config.intermediate_size
        tensors = names.layer_tensors(config, 0)
        attended = sum(math.prod(each.shape) for each in tensors if each.kind == "attention")
        passes, copies = 0.0, 0
        for _ in range(config.num_hidden_layers):
            passes += each.attention * (tokens + copies * copied + new * schemes * tokens)
            copies += new
            rows = tokens + (copies + 2) * copied + 2 * schemes * tokens
            passes += pairs * each.expert * rows
            copies += 2
        passes += each.head * (1 + copies) * copied
        rounded = schemes * (elements + (attended if self._with_attention else 0))
        return {PASS: passes, ROUND: float(config.num_hidden_layers * rounded)}

    @torch.no_grad()
    def groups(self, meter: WorkMeter | None = None) -> list[QuantGroup]:
        """Measure every group, in the model's order.

        Args:
            meter: counts `work`.

        Raises:
            CheckpointError: a weight holds NaN or infinity.
        """
        self._meter = meter or self._meter
        self._meter.plan(self.work())
        table = read_finite(self._checkpoint, self._tensors["model.embed_tokens.weight"])
        x = embedding(self._ids, Dense(table), torch.float32).to(self._device)  # (W, S, D)
        del table
        copies: list[Tensor] = []  # (copied windows, S, D), one for each kind of change and layer
        changes: list[list[_OutputChange]] = []  # the groups behind each copy
        for layer in range(self._config.num_hidden_layers):
            self._what = f"measuring layer {layer + 1} of {self._config.num_hidden_layers}"
            base = f"model.layers.{layer}"
            x, copies, measured = self._attention(base, layer, x, copies)
            changes += measured
            x, copies, measured = self._experts(base, x, copies)
            changes += measured
        costs = self._divergences(x[: self._copied], copies)
        return [
            QuantGroup(
                change.tensors,
                tuple(square * cost / self._total(copied) for square in change.squares),
                self._schemes,
            )
            for copied, cost in zip(changes, costs, strict=True)
            for change in copied
        ]

    def _attention(
        self, base: str, layer: int, x: Tensor, copies: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[list[_OutputChange]]]:
        """Run the attention block, and measure its two groups.

        Returns:
            The tokens after the block, the copies after it with two new ones, and the changes.
        """
        norm = self._norm(f"{base}.input_layernorm.weight")
        with torch.device("meta"):
            attention = Attention(self._config, layer)
        linears: dict[str, Linear] = {
            f"{base}.self_attn.{part}_proj.weight": getattr(attention, f"{part}_proj")
            for part in "qkvo"
        }
        exact = {name: self._read(name) for name in linears}
        for name, linear in linears.items():
            linear.store(exact[name])
        context = self._context()
        batch = max(1, BATCH_TOKENS // x.shape[1])

        def attend(hidden: Tensor) -> Tensor:
            parts = (hidden[first : first + batch] for first in range(0, len(hidden), batch))
            return torch.cat([attention(norm(part), context) for part in parts])

        attended = x.shape[0] * x.shape[1]
        rows = attended + sum(copy.shape[0] * copy.shape[1] for copy in copies)
        with self._meter.doing(self._what, PASS, self._work.attention * rows):
            out = attend(x)
            after, copies = x + out, [copy + attend(copy) for copy in copies]
        changes = []
        names = list(linears)
        for group in (names[:3], names[3:]) if self._with_attention else ():
            squares = []
            for scheme in self._schemes:
                for name in group:
                    linears[name].store(self._rounded(name, exact[name], scheme))
                with self._meter.doing(self._what, PASS, self._work.attention * attended):
                    changed = attend(x)
                squares.append(float((changed - out).square().mean()))
                if scheme == self._schemes[self._typical]:
                    copies.append((x + changed)[: self._copied])
            for name in group:
                linears[name].store(exact[name])
            changes.append([_OutputChange(self._named(group), tuple(squares))])
        return after, copies, changes

    def _experts(
        self, base: str, h: Tensor, copies: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[list[_OutputChange]]]:
        """Run the expert block, and measure the two groups of each expert; see `_attention`."""
        norm = self._norm(f"{base}.post_attention_layernorm.weight")
        gate = self._read(f"{base}.block_sparse_moe.gate.weight")
        # The exact tokens, the copies, and two new copies that will be changed here.
        streams = [h, *copies, h[: self._copied], h[: self._copied]]
        flat = [hidden.flatten(0, 1) for hidden in streams]
        routes = [
            kernels.route(kernels.linear(norm(rows), gate), self._config.num_experts_per_tok)
            for rows in flat
        ]
        sums = [torch.zeros_like(rows) for rows in flat]
        changes: list[list[_OutputChange]] = [[], []]
        for expert in range(self._config.num_local_experts):
            prefix = f"{base}.block_sparse_moe.experts.{expert}"
            names = tuple(f"{prefix}.{part}.weight" for part in ("w1", "w2", "w3"))
            exact = {name: self._read(name) for name in names}
            runs = []
            for rows, route, total in zip(flat, routes, sums, strict=True):
                token, slot = torch.where(route.ids == expert)
                with self._meter.doing(self._what, PASS, self._work.expert * len(token)):
                    x, score = norm(rows[token]), route.weights[token, slot, None]
                    run = _ExpertRun(token, x, score, exact, self._swiglu(x, score, exact))
                total.index_add_(0, token, run.output)
                runs.append(run)
            groups = ((names[0], names[2]), (names[1],))
            for group, copy_sum, measured in zip(groups, sums[-2:], changes, strict=True):
                measured.append(self._expert_change(runs[0], group, copy_sum, h.numel()))
        after = [
            (rows + total).view(*hidden.shape)
            for rows, total, hidden in zip(flat, sums, streams, strict=True)
        ]
        return after[0], after[1:], changes

    def _expert_change(
        self, run: _ExpertRun, group: Sequence[str], copy_sum: Tensor, elements: int
    ) -> _OutputChange:
        """Round a group of one expert under every scheme.

        Args:
            run: the exact expert on the exact tokens.
            copy_sum: the sum of the experts' outputs for the copy that is changed here; the change
                under the first scheme is added to it.
            elements: of the block's output, over which the square is averaged.
        """
        squares = []
        for scheme in self._schemes:
            rounded = {name: self._rounded(name, run.weights[name], scheme) for name in group}
            mixed = {**run.weights, **rounded}
            with self._meter.doing(self._what, PASS, self._work.expert * len(run.token)):
                change = self._swiglu(run.x, run.score, mixed) - run.output
            squares.append(float(change.square().sum()) / elements)
            if (
                scheme == self._schemes[self._typical]
            ):  # a copy has the same tokens and routes, so the same rows
                copied = run.token < self._copied * self._ids.shape[1]
                copy_sum.index_add_(0, run.token[copied], change[copied])
        return _OutputChange(self._named(group), tuple(squares))

    def _divergences(self, x: Tensor, copies: Sequence[Tensor]) -> list[float]:
        """KL(exact || changed) in nats a token, for each copy."""
        norm = self._norm("model.norm.weight")
        tied = self._config.tie_word_embeddings
        head = self._read("model.embed_tokens.weight" if tied else "lm_head.weight")
        sums = [0.0] * len(copies)
        work = self._work.head * (1 + len(copies)) * x.shape[1]
        windows = self._meter.each("measuring the head", PASS, range(len(x)), lambda _: work)
        for window in windows:
            exact = kernels.linear(norm(x[window]), head).log_softmax(-1)
            for index, copy in enumerate(copies):
                changed = kernels.linear(norm(copy[window]), head).log_softmax(-1)
                sums[index] += float((exact.exp() * (exact - changed)).sum(-1).mean())
        return [total / len(x) for total in sums]

    def _swiglu(self, x: Tensor, score: Tensor, weights: Mapping[str, Weight]) -> Tensor:
        """What an expert adds to its tokens [n, D]; `weights` are w1, w2 and w3 in this order."""
        w1, w2, w3 = weights.values()
        act = ACTIVATIONS[self._config.hidden_act]
        out = torch.empty_like(x)
        for start in range(0, len(x), BATCH_TOKENS):
            part = slice(start, start + BATCH_TOKENS)
            inner = act(kernels.linear(x[part], w1)) * kernels.linear(x[part], w3)
            out[part] = kernels.linear(inner, w2) * score[part]
        return out

    def _named(self, group: Sequence[str]) -> tuple[ModelTensor, ...]:
        return tuple(self._tensors[name] for name in group)

    def _read(self, name: str) -> Dense:
        data = read_finite(self._checkpoint, self._tensors[name])
        return Dense(data.to(self._device).float())

    def _rounded(self, name: str, exact: Dense, scheme: Scheme) -> Weight:
        where = f"{self._checkpoint.file_of(self._tensors[name])}: {name}"
        with self._meter.doing(self._what, ROUND, exact.data.numel()):
            return rtn.quantize(exact.data, scheme, search=True, where=where)

    def _norm(self, name: str) -> RMSNorm:
        norm = RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        norm.weight = nn.Parameter(self._read(name).data)
        return norm

    def _total(self, changes: Sequence[_OutputChange]) -> float:
        return sum(change.squares[self._typical] for change in changes) or 1.0

    def _context(self) -> ForwardContext:
        return ForwardContext.without_past(
            self._config, self._ids.shape[1], self._device, torch.float32
        )
