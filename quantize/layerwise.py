"""One decoder layer, rounded by GPTQ for the inputs it really gets.

In order: q, k and v; o; w1 and w3 of every expert; w2. Each sees what the rounded ones before it
compute, and tokens are routed by what the rounded attention gives the router. Reads one matrix (or
one expert's w1 and w3) at a time. Shape letters: T tokens, S window, D hidden width, F expert width,
E experts, K inputs of a matrix. Knows nothing of files but by `read`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.errors import CheckpointError
from qmix.formats import Checkpoint, names
from qmix.formats.names import ModelTensor
from qmix.kernels import Routes
from qmix.layers import ACTIVATIONS, Attention, Linear, RMSNorm, SparseMoeBlock, Step
from qmix.quantize import gptq, pipeline
from qmix.quantize.activations import Activations
from qmix.scheme import Recipe, Scheme
from qmix.weights import Dense, Weight

Weighting = Literal["none", "score", "square"]

_BATCH_TOKENS = 4096  # tokens a pass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Attributes:
    weighting: what a token counts in an expert's H: 1, its routing weight or that squared.
    rounding: of each matrix.
    """

    weighting: Weighting = "score"
    rounding: gptq.Options = field(default_factory=gptq.Options)


@dataclass(frozen=True, eq=False, kw_only=True)
class Rounded:
    """One tensor of the layer.

    Attributes:
        weight: on the CPU; Dense where the recipe leaves the tensor as it is.
        tokens: how many the matrix saw; None if dense.
        solution: how it was rounded; None if dense.
        seconds: of work, shared equally by matrices that were rounded together.
    """

    tensor: ModelTensor
    weight: Weight
    tokens: int | None = None
    solution: gptq.Solution | None = None
    seconds: float = 0.0


class LayerQuantizer:
    """Rounds layer `layer` and runs the calibration tokens through the result.

    Args:
        hidden: the layer's input [T, D], rows of windows of `seqlen`; stays as it is.
        output: [T, D]; holds the layer's output when `run` has ended.
        device: where all is computed, in float32.
        progress: called with each tensor that is about to be rounded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: int,
        hidden: Activations,
        output: Activations,
        *,
        seqlen: int,
        recipe: Recipe,
        options: Options,
        device: torch.device,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._checkpoint, self._config = checkpoint, checkpoint.config
        self._layer, self._base = layer, f"model.layers.{layer}"
        self._hidden, self._output, self._seqlen = hidden, output, seqlen
        self._recipe, self._options, self._device = recipe, options, device
        self._progress = progress
        self._tensors = {t.name: t for t in names.layer_tensors(self._config, layer)}
        self._done: dict[str, Rounded] = {}

    @torch.no_grad()
    def run(self) -> tuple[Rounded, ...]:
        """Every tensor of the layer, in the model's order.

        Raises:
            CheckpointError: a weight or an activation is not finite.
        """
        self._round_attention()
        routes = self._route()
        self._round_experts(routes)
        self._finish()
        return tuple(self._done[name] for name in self._tensors)

    def _round_attention(self) -> None:
        """q, k, v, then o; leaves the input plus the attention's part in `output`."""
        norm, step = self._norm("input_layernorm"), self._step()
        with torch.device("meta"):
            attention = Attention(self._config, self._layer)
        names = [f"{self._base}.self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")]
        hessian = _Hessian(self._config.hidden_size, self._device)
        for _, x in self._windows(self._hidden):
            hessian.add(norm(x))
        self._round(names, hessian)
        for name in names:
            self._store(attention.get_submodule(name.split(".")[-2]), name)

        name = f"{self._base}.self_attn.o_proj.weight"
        attention.o_proj.store(Dense(self._dense(name).to(self._device).float()))
        hessian = _Hessian(attention.o_proj.in_features, self._device)
        hook = attention.o_proj.register_forward_pre_hook(lambda _, args: hessian.add(args[0]))
        for _, x in self._windows(self._hidden):
            attention(norm(x), step)
        hook.remove()
        self._round([name], hessian)
        self._store(attention.o_proj, name)
        for start, x in self._windows(self._hidden):
            self._output.write(start, (x + attention(norm(x), step)).flatten(0, 1))

    def _route(self) -> Routes:
        """What every token's rounded attention makes the router choose, on the CPU."""
        norm, gate = self._norm("post_attention_layernorm"), self._gate()
        routes = [
            kernels.route(gate(norm(x).flatten(0, 1)), self._config.num_experts_per_tok)
            for _, x in self._windows(self._output)
        ]
        return Routes(
            torch.cat([part.ids.cpu() for part in routes]),
            torch.cat([part.weights.cpu() for part in routes]),
        )

    def _round_experts(self, routes: Routes) -> None:
        for expert in range(self._config.num_local_experts):
            token, slot = torch.where(routes.ids == expert)
            self._round_expert(expert, token, routes.weights[token, slot])

    def _round_expert(self, expert: int, tokens: Tensor, scores: Tensor) -> None:
        """w1 and w3 from one H, then w2 from what the two make of the tokens."""
        base = f"{self._base}.block_sparse_moe.experts.{expert}"
        gate, down, up = (f"{base}.{part}.weight" for part in ("w1", "w2", "w3"))
        norm, act = self._norm("post_attention_layernorm"), ACTIVATIONS[self._config.hidden_act]
        counted = {"none": torch.ones_like(scores), "score": scores, "square": scores.square()}
        importance = counted[self._options.weighting]
        hessian = _Hessian(self._config.hidden_size, self._device)
        for x, share in self._chosen(tokens, importance):
            hessian.add(norm(x), share)
        self._round([gate, up], hessian)

        hessian = _Hessian(self._config.intermediate_size, self._device)
        w1, w3 = (self._done[name].weight.to(self._device) for name in (gate, up))
        for x, share in self._chosen(tokens, importance):
            x = norm(x)
            hessian.add(act(kernels.linear(x, w1)) * kernels.linear(x, w3), share)
        self._round([down], hessian)

    def _finish(self) -> None:
        """Add what the rounded experts make of `output` to it."""
        norm = self._norm("post_attention_layernorm")
        with torch.device("meta"):
            moe = SparseMoeBlock(self._config)
        moe.gate = self._gate()
        for expert in range(self._config.num_local_experts):
            for part in ("w1", "w2", "w3"):
                place = f"block_sparse_moe.experts.{expert}.{part}"
                linear = moe.get_submodule(place.removeprefix("block_sparse_moe."))
                self._store(linear, f"{self._base}.{place}.weight")
        moe.eval()
        for start, x in self._windows(self._output):
            y, _ = moe(norm(x))
            x = x + y
            if not bool(torch.isfinite(x).all()):
                raise CheckpointError(
                    f"the activations after layer {self._layer} are not finite",
                    where=str(self._checkpoint.shards.directory),
                    remedy="The checkpoint is damaged.",
                )
            self._output.write(start, x.flatten(0, 1))

    def _round(self, names: Sequence[str], hessian: "_Hessian") -> None:
        """Round matrices with the same inputs; those of one scheme are stacked."""
        schemes: dict[Scheme, list[str]] = {}
        for name in names:
            schemes.setdefault(self._recipe.scheme_of(name), []).append(name)
        for scheme, members in schemes.items():
            begun = time.perf_counter()
            if scheme.kind == "dense":
                for name in members:
                    self._keep(name)
                continue
            self._progress(members[0])
            weights = [self._dense(name) for name in members]
            (solutions,) = gptq.solve(
                torch.cat(weights).to(self._device)[None],
                hessian.sum[None].clone() if len(schemes) > 1 else hessian.sum[None],
                [hessian.samples],
                scheme,
                self._options.rounding,
                where=[f"{self._where(members[0])}"],
                parts=[len(weight) for weight in weights],
            )
            seconds = (time.perf_counter() - begun) / len(members)
            for name, solution in zip(members, solutions, strict=True):
                self._done[name] = Rounded(
                    tensor=self._tensors[name],
                    weight=solution.weight,
                    tokens=hessian.tokens,
                    solution=solution,
                    seconds=seconds,
                )

    def _keep(self, name: str) -> None:
        self._done[name] = Rounded(tensor=self._tensors[name], weight=Dense(self._dense(name)))

    def _dense(self, name: str) -> Tensor:
        return pipeline.read(self._checkpoint, self._tensors[name])

    def _where(self, name: str) -> str:
        return f"{self._checkpoint.entry(name).file}: {name}"

    def _store(self, linear: nn.Module, name: str) -> None:
        assert isinstance(linear, Linear)
        weight = self._done[name].weight.to(self._device)
        if isinstance(weight, Dense):
            weight = Dense(weight.data.float())
        linear.store(weight)

    def _norm(self, part: str) -> RMSNorm:
        name = f"{self._base}.{part}.weight"
        if name not in self._done:
            self._keep(name)
        weight = self._done[name].weight
        assert isinstance(weight, Dense)
        norm = RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        norm.weight = nn.Parameter(weight.data.float())
        return norm.to(self._device)

    def _gate(self) -> Linear:
        name = f"{self._base}.block_sparse_moe.gate.weight"
        if name not in self._done:
            self._keep(name)
        with torch.device("meta"):
            gate = Linear(self._config.hidden_size, self._config.num_local_experts)
        self._store(gate, name)
        return gate

    def _step(self) -> Step:
        positions = torch.arange(self._seqlen, device=self._device)[None]
        config = self._config
        cos, sin = kernels.rotary(positions, config.head_dim, config.rope_theta, torch.float32)
        return Step(cos=cos, sin=sin, keep=None, cache=None)

    def _windows(self, source: Activations) -> Iterator[tuple[int, Tensor]]:
        """(first row, [windows, S, D]) of all tokens in turn."""
        step = max(1, _BATCH_TOKENS // self._seqlen) * self._seqlen
        for start in range(0, source.tokens, step):
            x = source.read(start, min(start + step, source.tokens))
            yield start, x.to(self._device).view(-1, self._seqlen, source.width)

    def _chosen(self, tokens: Tensor, importance: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows [n, D] of `output` at ascending `tokens`, with what each of them counts [n]."""
        for start in range(0, len(tokens), _BATCH_TOKENS):
            batch = slice(start, start + _BATCH_TOKENS)
            x = self._output.rows(tokens[batch]).to(self._device)
            yield x, importance[batch].to(self._device)


class _Hessian:
    """The sum of `share * x x^T` over inputs [..., K]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, width, device=device)
        self.tokens = 0
        self._shares = self._squares = 0.0

    def add(self, inputs: Tensor, shares: Tensor | None = None) -> None:
        """`shares` [n]: what each input counts; None counts every one as 1."""
        flat = inputs.reshape(-1, self.sum.shape[0])
        self.tokens += len(flat)
        if shares is None:
            self._shares += len(flat)
            self._squares += len(flat)
        else:
            self._shares += float(shares.sum())
            self._squares += float(shares.square().sum())
            flat = flat * shares.sqrt()[:, None]
        self.sum.addmm_(flat.T, flat)

    @property
    def samples(self) -> float:
        """How many inputs of equal shares tell as much (Kish's effective sample size)."""
        return self._shares**2 / self._squares if self._squares else 0.0
