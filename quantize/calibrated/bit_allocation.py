"""Which weights deserve more bits: a Recipe of least measured loss within a budget of bits a weight.

A group is q, k and v of a layer; its o; an expert's w1 and w3; its w2. Each is rounded alone under every
scheme, and the change of its block's output measured. What such a change costs in the end, KL(exact ||
changed) of the next token, is measured once a layer for qkv, o, all w1 and w3, and all w2: a copy of
the tokens, changed there, runs through the rest of the model beside the others. A group's loss is its
change times what its kind of change costs in its layer. Losses are added as if errors were independent;
bits go where a bit takes away most loss.

The relative change of the residual stream alone does not do: on the tiny model a like change costs 0.3
in one layer and 5 in the next (evals/LOG.md). Shape letters: P copies, T tokens, S window, D hidden
width. Knows nothing of files but by the checkpoint.
"""

import heapq
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.errors import UsageError
from qmix.formats import Checkpoint
from qmix.formats.names import ModelTensor
from qmix.nn.attention import Attention, ForwardContext
from qmix.nn.decoder import embedding
from qmix.nn.linear import Linear, RMSNorm
from qmix.nn.moe import ACTIVATIONS
from qmix.quantize import streaming
from qmix.quantize.rounding import rtn
from qmix.weights.dense import Dense, Weight
from qmix.weights.scheme import Recipe, Scheme

# From the fewest bits to the most; the first is what every weight has at least.
CHOICES = (
    Scheme(kind="int4", group_size=128),
    Scheme(kind="int4", group_size=64),
    Scheme(kind="int4", group_size=32),
    Scheme(kind="int8", group_size=128),
)
_TOKENS = 32768  # 0.5 GB of float32 at D = 4096
_COPIED_TOKENS = 8192
_ALL_COPIED_TOKENS = 1 << 18  # in all copies: 4.3 GB; 2048 in each of Mixtral-8x7B's 128
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class QuantGroup:
    """Weights that share a scheme, and their loss under each of CHOICES."""

    tensors: tuple[ModelTensor, ...]
    losses: tuple[float, ...]

    @property
    def parameters(self) -> int:
        return sum(tensor.shape[0] * tensor.shape[1] for tensor in self.tensors)


def check(bits: float) -> None:
    """Refuse a budget that no recipe meets.

    Raises:
        UsageError: with the range.
    """
    low, high = CHOICES[0].bits_per_weight, CHOICES[-1].bits_per_weight
    if not low <= bits <= high:
        raise UsageError("out of range", where="--bits", expected=f"{low} to {high}", found=bits)


def recipe(groups: Sequence[QuantGroup], bits: float) -> Recipe:
    """The greedy choice: raise the group whose next step takes away most loss a bit, while it fits.

    Args:
        bits: on average over the groups' weights, scales included.
    """
    room = sum(group.parameters for group in groups) * (bits - CHOICES[0].bits_per_weight)
    chosen = [0] * len(groups)
    steps = [step for index in range(len(groups)) if (step := _step(groups[index], index, 0))]
    heapq.heapify(steps)
    while steps:
        _, index, level, cost = heapq.heappop(steps)
        if cost > room * (1 + 1e-9):
            continue
        room -= cost
        chosen[index] = level
        if following := _step(groups[index], index, level):
            heapq.heappush(steps, following)
    rules = [
        (re.escape(tensor.name), CHOICES[level])
        for group, level in zip(groups, chosen, strict=True)
        for tensor in group.tensors
    ]
    return Recipe(tuple(rules))


def _step(group: QuantGroup, index: int, level: int) -> tuple[float, int, int, float] | None:
    """The best rise from `level`: (minus loss a bit, group, new level, bits); None without a gain."""
    best = None
    for higher in range(level + 1, len(CHOICES)):
        gain = group.losses[level] - group.losses[higher]
        cost = group.parameters * (CHOICES[higher].bits_per_weight - CHOICES[level].bits_per_weight)
        if gain > 0 and (best is None or -gain / cost < best[0]):
            best = (-gain / cost, index, higher, cost)
    return best


class Sensitivity:
    """Measures the groups of a checkpoint, a layer at a time, one expert in memory.

    Args:
        ids: int64 (W, S); an even choice of windows is taken, 32768 tokens and fewer in the copies.
        attention: whether the attention's matrices are to be quantized.
    """

    def __init__(
        self, checkpoint: Checkpoint, ids: Tensor, *, attention: bool, device: torch.device
    ) -> None:
        self._checkpoint, self._config = checkpoint, checkpoint.config
        self._attended, self._device = attention, device
        self._ids = _thinned(ids, _TOKENS)
        copied = min(_COPIED_TOKENS, _ALL_COPIED_TOKENS // (4 * self._config.num_hidden_layers))
        # The first windows of those are copied; every window is as good as another.
        self._copied = max(1, min(len(self._ids), copied // ids.shape[1]))
        self._tensors = {tensor.name: tensor for tensor in checkpoint.tensors}

    @torch.no_grad()
    def groups(
        self, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[QuantGroup]:
        """Every group, in the model's order; progress(layers done, layers)."""
        table = self._checkpoint.read("model.embed_tokens.weight")
        x = embedding(self._ids, table).to(self._device).float()  # (W, S, D)
        del table
        copies: list[Tensor] = []  # (copied windows, S, D), one a kind and layer
        changes: list[list[_Change]] = []  # the groups behind each copy
        for layer in range(self._config.num_hidden_layers):
            progress(layer, self._config.num_hidden_layers)
            base = f"model.layers.{layer}"
            x, copies, found = self._attention(base, layer, x, copies)
            changes += found
            x, copies, found = self._experts(base, x, copies)
            changes += found
        costs = self._divergences(x[: self._copied], copies)
        return [
            QuantGroup(change.tensors, tuple(loss * cost / _total(group) for loss in change.losses))
            for group, cost in zip(changes, costs, strict=True)
            for change in group
        ]

    def _attention(
        self, base: str, layer: int, x: Tensor, copies: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[list["_Change"]]]:
        norm = self._norm(f"{base}.input_layernorm.weight")
        with torch.device("meta"):
            attention = Attention(self._config, layer)
        linears: dict[str, Linear] = {
            f"{base}.self_attn.{part}_proj.weight": getattr(attention, f"{part}_proj")
            for part in "qkvo"
        }
        for name, linear in linears.items():
            linear.store(self._read(name))
        context = self._context()
        batch = max(1, _BATCH_TOKENS // x.shape[1])

        def run(hidden: Tensor) -> Tensor:
            parts = (hidden[first : first + batch] for first in range(0, len(hidden), batch))
            return torch.cat([attention(norm(part), context) for part in parts])

        out = run(x)
        after, copies = x + out, [copy + run(copy) for copy in copies]
        found = []
        names = list(linears)
        for group in (names[:3], names[3:]) if self._attended else ():
            losses = []
            for scheme in CHOICES:
                for name in group:
                    linears[name].store(self._rounded(name, scheme))
                changed = run(x)
                losses.append(float((changed - out).square().mean()))
                if scheme == CHOICES[0]:
                    copies.append((x + changed)[: self._copied])
            for name in group:
                linears[name].store(self._read(name))
            found.append([_Change(self._named(group), tuple(losses))])
        return after, copies, found

    def _experts(
        self, base: str, h: Tensor, copies: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[list["_Change"]]]:
        norm = self._norm(f"{base}.post_attention_layernorm.weight")
        gate = self._read(f"{base}.block_sparse_moe.gate.weight")
        everyone = [
            h,
            *copies,
            h[: self._copied],
            h[: self._copied],
        ]  # the last two will be changed
        flat = [hidden.flatten(0, 1) for hidden in everyone]
        routes = [
            kernels.route(kernels.linear(norm(rows), gate), self._config.num_experts_per_tok)
            for rows in flat
        ]
        sums = [torch.zeros_like(rows) for rows in flat]
        found: list[list[_Change]] = [[], []]
        for expert in range(self._config.num_local_experts):
            prefix = f"{base}.block_sparse_moe.experts.{expert}"
            w1, w2, w3 = (f"{prefix}.{part}.weight" for part in ("w1", "w2", "w3"))
            exact: dict[str, Weight] = {name: self._read(name) for name in (w1, w2, w3)}
            chosen = [torch.where(route.ids == expert) for route in routes]
            outputs = []
            for rows, route, (token, slot), total in zip(flat, routes, chosen, sums, strict=True):
                y = self._swiglu(
                    norm(rows[token]), route.weights[token, slot, None], *exact.values()
                )
                outputs.append(y)
                total.index_add_(0, token, y)
            for kind, group in enumerate(((w1, w3), (w2,))):
                token, slot = chosen[0]
                x, score = norm(flat[0][token]), routes[0].weights[token, slot, None]
                losses = []
                for scheme in CHOICES:
                    mixed = {**exact, **{name: self._rounded(name, scheme) for name in group}}
                    change = self._swiglu(x, score, *mixed.values()) - outputs[0]
                    losses.append(float(change.square().sum()) / flat[0].numel())
                    if scheme == CHOICES[0]:  # the same tokens and routes, so the same rows
                        mine = token < self._copied * h.shape[1]
                        sums[kind - 2].index_add_(0, token[mine], change[mine])
                found[kind].append(_Change(self._named(group), tuple(losses)))
        after = [
            (rows + total).view(*hidden.shape)
            for rows, total, hidden in zip(flat, sums, everyone, strict=True)
        ]
        return after[0], after[1:], found

    def _divergences(self, x: Tensor, copies: Sequence[Tensor]) -> list[float]:
        """KL(exact || changed) a token in nats, for each copy."""
        norm = self._norm("model.norm.weight")
        tied = self._config.tie_word_embeddings
        head = self._read("model.embed_tokens.weight" if tied else "lm_head.weight")
        sums = [0.0] * len(copies)
        for window in range(len(x)):
            exact = kernels.linear(norm(x[window]), head).log_softmax(-1)
            for index, copy in enumerate(copies):
                other = kernels.linear(norm(copy[window]), head).log_softmax(-1)
                sums[index] += float((exact.exp() * (exact - other)).sum(-1).mean())
        return [total / len(x) for total in sums]

    def _swiglu(self, x: Tensor, score: Tensor, w1: Weight, w2: Weight, w3: Weight) -> Tensor:
        """What an expert adds to its tokens: [n, D]."""
        act = ACTIVATIONS[self._config.hidden_act]
        out = torch.empty_like(x)
        for start in range(0, len(x), _BATCH_TOKENS):
            part = slice(start, start + _BATCH_TOKENS)
            inner = act(kernels.linear(x[part], w1)) * kernels.linear(x[part], w3)
            out[part] = kernels.linear(inner, w2) * score[part]
        return out

    def _named(self, group: Sequence[str]) -> tuple[ModelTensor, ...]:
        return tuple(self._tensors[name] for name in group)

    def _read(self, name: str) -> Dense:
        data = streaming.read(self._checkpoint, self._tensors[name])
        return Dense(data.to(self._device).float())

    def _rounded(self, name: str, scheme: Scheme) -> Weight:
        where = f"{self._checkpoint.entry(name).file}: {name}"
        data = self._checkpoint.read(name).to(self._device)
        return rtn.quantize(data, scheme, search=True, where=where)

    def _norm(self, name: str) -> RMSNorm:
        norm = RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        norm.weight = nn.Parameter(self._read(name).data)
        return norm

    def _context(self) -> ForwardContext:
        positions = torch.arange(self._ids.shape[1], device=self._device)[None]
        config = self._config
        cos, sin = kernels.rotary(positions, config.head_dim, config.rope_theta, torch.float32)
        return ForwardContext(cos=cos, sin=sin)


@dataclass(frozen=True)
class _Change:
    """A group's mean squared change of its block's output under each of CHOICES."""

    tensors: tuple[ModelTensor, ...]
    losses: tuple[float, ...]


def _total(group: Sequence[_Change]) -> float:
    return sum(change.losses[0] for change in group) or 1.0


def _thinned(ids: Tensor, tokens: int) -> Tensor:
    windows = max(1, tokens // ids.shape[1])
    return ids[:: -(-len(ids) // windows)]
