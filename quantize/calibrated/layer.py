"""One decoder layer, rounded by GPTQ for the inputs that it really gets.

The order is q, k and v; o; w1 and w3 of every expert; w2. Each matrix sees what the rounded
matrices before it compute, and tokens are routed by what the rounded attention feeds the router.
The unrounded model runs beside it on the same tokens, and each matrix is fitted to *its* outputs
(https://arxiv.org/abs/2504.02692), so that a layer takes back part of the errors of earlier layers.

One expert is in memory at a time. Shape letters: T tokens, S window, D hidden width, F expert
width, E experts, K inputs of a matrix, n tokens of a batch. Knows the checkpoint, but no other
files.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.errors import CheckpointError
from qmix.formats import Checkpoint, names
from qmix.kernels import Routes
from qmix.nn.attention import Attention, ForwardContext
from qmix.nn.linear import Linear, RMSNorm
from qmix.nn.moe import ACTIVATIONS, SparseMoeBlock
from qmix.quantize.calibrated.activations import Activations
from qmix.quantize.calibrated.gpu_memory import experts_at_once
from qmix.quantize.calibrated.layer_work import PASS, SOLVE, LayerWork, schemes_of
from qmix.quantize.calibrated.options import LayerOptions
from qmix.quantize.calibrated.rounded_tensor import RoundedTensor
from qmix.quantize.calibrated.token_stream import TokenStream, token_batches, window_batches
from qmix.quantize.output_checkpoint import read_finite, squared_sums
from qmix.quantize.rounding import gptq
from qmix.quantize.rounding.hessian import Moments
from qmix.weights.dense import Dense, Weight, all_finite
from qmix.weights.scheme import Recipe, Scheme
from qmix.work_meter import WorkMeter

_Batch = TypeVar("_Batch", bound=tuple[Any, ...])


class LayerQuantizer:
    """Rounds layer `layer` and runs the calibration tokens through the result.

    Args:
        rounded: the tokens of the model that is being rounded, in windows of `seqlen`.
        exact: the tokens of the unrounded model, and an array [T, D] for the sum of its experts'
            outputs; None without correction.
        device: where everything is computed.
        dtype: of forward passes; what is summed or solved is float32.
        meter: counts the work; LayerWork says how much there is.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: int,
        rounded: TokenStream,
        exact: tuple[TokenStream, Activations] | None,
        *,
        seqlen: int,
        recipe: Recipe,
        options: LayerOptions,
        device: torch.device,
        dtype: torch.dtype,
        meter: WorkMeter,
    ) -> None:
        assert options.correct == (exact is not None)
        self._checkpoint, self._config = checkpoint, checkpoint.config
        self._layer, self._base = layer, f"model.layers.{layer}"
        self._rounded, self._seqlen = rounded, seqlen
        self._exact = None if exact is None else exact[0]
        self._expert_sum = None if exact is None else exact[1]
        self._recipe, self._options = recipe, options
        self._device, self._dtype = device, dtype
        self._meter, self._work = meter, LayerWork(checkpoint.config, options)
        self._what = f"layer {layer + 1} of {self._config.num_hidden_layers}"
        self._tensors = {t.name: t for t in names.layer_tensors(self._config, layer)}
        self._results: dict[str, RoundedTensor] = {}

    @torch.no_grad()
    def quantize(self) -> tuple[RoundedTensor, ...]:
        """Round every tensor of the layer and return them in the model's order.

        Raises:
            CheckpointError: a weight or an activation is not finite.
        """
        self._round_attention()
        routes = self._route(self._rounded.after)
        exact_routes = self._route(self._exact.after) if self._exact else None
        experts = range(self._config.num_local_experts)
        step = experts_at_once(self._config, self._device)
        for first in range(0, len(experts), step):
            self._round_experts(experts[first : first + step], routes, exact_routes)
        self._add_experts()
        return tuple(self._results[name] for name in self._tensors)

    @torch.no_grad()
    def run(self, weights: Mapping[str, Weight]) -> None:
        """Take the tokens through the layer as `quantize` does, with weights rounded before.

        Args:
            weights: by name; the others stay as they are in the checkpoint.
        """
        for name, tensor in self._tensors.items():
            if name in weights:
                self._results[name] = RoundedTensor(tensor=tensor, weight=weights[name])
            else:
                self._leave_dense(name)
        self._run_attention()
        if self._exact is not None:
            routes = self._route(self._exact.after)
            for expert in range(self._config.num_local_experts):
                names = [self._expert(expert, part) for part in ("w1", "w3")]
                inner = self._swiglu(*(self._unrounded(name) for name in names))
                self._sum_exact(expert, inner, routes)
        self._add_experts()

    def _run_attention(self) -> None:
        """Leave the input plus the attention's output in `after`, for both models."""
        norm, context = self._norm("input_layernorm"), self._context()
        with torch.device("meta"):
            attention, exact = (Attention(self._config, self._layer) for _ in range(2))
        for part in "qkvo":
            name = f"{self._base}.self_attn.{part}_proj.weight"
            self._store(attention.get_submodule(f"{part}_proj"), name)
            if self._exact is not None:
                linear = exact.get_submodule(f"{part}_proj")
                assert isinstance(linear, Linear)
                linear.store(self._unrounded(name))
        for start, x, e in self._windows(self._work.both_attentions):
            self._rounded.after.write(start, (x + attention(norm(x), context)).flatten(0, 1))
            if e is not None:
                assert self._exact is not None
                self._exact.after.write(start, (e + exact(norm(e), context)).flatten(0, 1))

    def _round_attention(self) -> None:
        """Round q, k, v, then o, unless all stay dense; leave input plus output in `after`."""
        names = [f"{self._base}.self_attn.{part}_proj.weight" for part in "qkvo"]
        if all(self._recipe.scheme_of(name).kind == "dense" for name in names):
            for name in names:
                self._leave_dense(name)
            self._run_attention()
            return
        norm, context = self._norm("input_layernorm"), self._context()
        with torch.device("meta"):
            attention, exact = (Attention(self._config, self._layer) for _ in range(2))
        for name in names if self._exact else names[3:]:
            linear = exact.get_submodule(name.split(".")[-2])
            assert isinstance(linear, Linear)
            linear.store(self._unrounded(name))
        moments = self._moments(self._config.hidden_size)
        for _, x, e in self._windows(self._work.moments(self._config.hidden_size)):
            moments.add(norm(x), exact=None if e is None else norm(e))
        self._round([(names[:3], moments)])
        for name in names[:3]:
            self._store(attention.get_submodule(name.split(".")[-2]), name)

        attention.o_proj.store(exact.o_proj.stored)
        moments = self._moments(attention.o_proj.in_features)
        o_inputs: list[Tensor] = []
        hooks = [
            module.o_proj.register_forward_pre_hook(lambda _, args: o_inputs.append(args[0]))
            for module in (attention, exact)
        ]
        work = self._work.both_attentions + self._work.moments(attention.o_proj.in_features)
        for start, x, e in self._windows(work):
            attention(norm(x), context)
            if e is not None:
                assert self._exact is not None
                self._exact.after.write(start, (e + exact(norm(e), context)).flatten(0, 1))
            moments.add(o_inputs[0], exact=o_inputs[1] if e is not None else None)
            o_inputs.clear()
        for hook in hooks:
            hook.remove()
        self._round([(names[3:], moments)])
        self._store(attention.o_proj, names[3])
        for start, x, _ in self._windows(self._work.attention):
            self._rounded.after.write(start, (x + attention(norm(x), context)).flatten(0, 1))

    def _route(self, tokens: Activations) -> Routes:
        """The router's choice for each token, on the CPU."""
        norm, gate = self._norm("post_attention_layernorm"), self._gate()
        routes = [
            kernels.route(gate(norm(x)), self._config.num_experts_per_tok)
            for _, x in self._batches(tokens)
        ]
        return Routes(
            torch.cat([batch.ids.cpu() for batch in routes]),
            torch.cat([batch.weights.cpu() for batch in routes]),
        )

    def _round_experts(
        self, experts: Sequence[int], routes: Routes, exact_routes: Routes | None
    ) -> None:
        """Round w1 and w3 of each expert for the same inputs, then w2 for what the two compute."""
        jobs = []
        for expert in experts:
            moments = self._moments(self._config.hidden_size)
            work = self._work.moments(self._config.hidden_size)
            for x, e, token_weights in self._expert_inputs(expert, routes, work):
                moments.add(x, token_weights, exact=e)
            jobs.append(([self._expert(expert, "w1"), self._expert(expert, "w3")], moments))
        self._round(jobs)
        jobs = []
        for expert in experts:
            names = [self._expert(expert, part) for part in ("w1", "w3")]
            exact: Callable[[Tensor], Tensor] | None = None
            if exact_routes is not None:
                exact = self._swiglu(*(self._unrounded(name) for name in names))
                self._sum_exact(expert, exact, exact_routes)
            inner = self._swiglu(*(self._rounded_weight(name) for name in names))
            moments = self._moments(self._config.intermediate_size)
            work = self._work.inner_moments
            for x, e, token_weights in self._expert_inputs(expert, routes, work):
                exact_inner = exact(e) if exact and e is not None else None
                moments.add(inner(x), token_weights, exact=exact_inner)
            jobs.append(([self._expert(expert, "w2")], moments))
            del exact, inner  # 0.7 GB
        self._round(jobs)

    def _sum_exact(self, expert: int, inner: Callable[[Tensor], Tensor], routes: Routes) -> None:
        """Add the unrounded expert's outputs for its own tokens to the sum over experts."""
        assert self._exact is not None
        assert self._expert_sum is not None
        down = self._unrounded(self._expert(expert, "w2"))
        norm = self._norm("post_attention_layernorm")
        token, slot = torch.where(routes.ids == expert)
        batches = token_batches(token, routes.weights[token, slot])
        for index, score in self._counted(batches, self._work.expert):
            x = norm(self._exact.after.rows(index).to(self._device))
            y = kernels.linear(inner(x), down) * score.to(self._device)[:, None]
            self._expert_sum.add_rows(index, y)

    def _add_experts(self) -> None:
        """Add the experts' outputs to `after` of both models."""
        norm = self._norm("post_attention_layernorm")
        with torch.device("meta"):
            moe = SparseMoeBlock(self._config)
        moe.gate = self._gate()
        for expert in range(self._config.num_local_experts):
            for part in ("w1", "w2", "w3"):
                name = self._expert(expert, part)
                self._store(moe.get_submodule(f"experts.{expert}.{part}"), name)
        moe.eval()
        work = self._config.num_experts_per_tok * self._work.expert
        for start, x in self._counted(self._batches(self._rounded.after), work):
            y, _ = moe(norm(x)[None])
            self._write(self._rounded.after, start, x + y[0])
        if self._exact is not None:
            assert self._expert_sum is not None
            for start, x in self._batches(self._exact.after):
                y = self._expert_sum.read(start, start + len(x)).to(self._device)
                self._write(self._exact.after, start, x + y)

    def _write(self, target: Activations, start: int, values: Tensor) -> None:
        if not all_finite(values):
            raise CheckpointError(
                f"the activations after layer {self._layer} are not finite",
                where=str(self._checkpoint.shards.directory),
                remedy="The checkpoint is damaged.",
            )
        target.write_final(start, values)

    def _round(self, jobs: Sequence[tuple[Sequence[str], Moments]]) -> None:
        """Round matrices. Those of a job share their inputs; those of one scheme are stacked."""
        batches: dict[tuple[Scheme, int], list[tuple[list[str], Moments]]] = {}
        for matrices, moments in jobs:
            schemes = schemes_of(matrices, self._recipe)
            for index, (scheme, members) in enumerate(schemes.items()):
                member_moments = moments if index == 0 else moments.copy()
                batches.setdefault((scheme, len(members)), []).append((members, member_moments))
        for (scheme, _), batch in batches.items():
            if scheme.kind == "dense":
                for members, _ in batch:
                    for name in members:
                        self._leave_dense(name)
            else:
                self._solve(scheme, batch)

    def _solve(self, scheme: Scheme, batch: Sequence[tuple[Sequence[str], Moments]]) -> None:
        begun = time.perf_counter()
        first, _ = batch[0]
        rows = [self._tensors[name].shape[0] for name in first]
        work = self._work.solve(self._tensors[first[0]].shape[1], sum(rows), len(batch))
        with self._meter.doing(self._what, SOLVE, work) as tell:
            stacked = [torch.cat([self._read(name) for name in members]) for members, _ in batch]
            solutions = gptq.solve(
                torch.stack([weight.to(self._device) for weight in stacked]),
                [moments for _, moments in batch],
                scheme,
                self._options.rounding,
                where=[self._where(names[0]) for names, _ in batch],
                parts=rows,
                tell=tell,
            )
        seconds = (time.perf_counter() - begun) / (len(batch) * len(first))
        for (members, moments), source, parts in zip(batch, stacked, solutions, strict=True):
            exact = source.split_with_sizes(rows)
            for name, weight, solution in zip(members, exact, parts, strict=True):
                self._results[name] = RoundedTensor(
                    tensor=self._tensors[name],
                    weight=solution.weight,
                    tokens=moments.tokens,
                    solution=solution,
                    squared=squared_sums(weight, solution.weight),
                    seconds=seconds,
                )

    def _expert(self, expert: int, part: str) -> str:
        return f"{self._base}.block_sparse_moe.experts.{expert}.{part}.weight"

    def _moments(self, width: int) -> Moments:
        return Moments(width, self._device, crossed=self._options.correct)

    def _where(self, name: str) -> str:
        return f"{self._checkpoint.file_of(self._tensors[name])}: {name}"

    def _read(self, name: str) -> Tensor:
        return read_finite(self._checkpoint, self._tensors[name])

    def _unrounded(self, name: str) -> Dense:
        return Dense(self._read(name).to(self._device, self._dtype))

    def _leave_dense(self, name: str) -> None:
        self._results[name] = RoundedTensor(
            tensor=self._tensors[name], weight=Dense(self._read(name))
        )

    def _store(self, linear: nn.Module, name: str) -> None:
        assert isinstance(linear, Linear)
        linear.store(self._rounded_weight(name))

    def _rounded_weight(self, name: str) -> Weight:
        weight = self._results[name].weight.to(self._device)
        return Dense(weight.data.to(self._dtype)) if isinstance(weight, Dense) else weight

    def _swiglu(self, gate: Weight, up: Weight) -> Callable[[Tensor], Tensor]:
        act = ACTIVATIONS[self._config.hidden_act]
        return lambda x: act(kernels.linear(x, gate)) * kernels.linear(x, up)

    def _norm(self, part: str) -> Callable[[Tensor], Tensor]:
        """A norm in float32, whose outputs have the dtype of forward passes."""
        name = f"{self._base}.{part}.weight"
        if name not in self._results:
            self._leave_dense(name)
        weight = self._results[name].weight
        assert isinstance(weight, Dense)
        norm = RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        norm.weight = nn.Parameter(weight.data.float())
        norm.to(self._device)
        return lambda x: norm(x).to(self._dtype)

    def _gate(self) -> Linear:
        name = f"{self._base}.block_sparse_moe.gate.weight"
        if name not in self._results:
            self._leave_dense(name)
        with torch.device("meta"):
            gate = Linear(self._config.hidden_size, self._config.num_local_experts)
        self._store(gate, name)
        return gate

    def _context(self) -> ForwardContext:
        return ForwardContext.without_past(self._config, self._seqlen, self._device, self._dtype)

    def _batches(self, tokens: Activations) -> Iterator[tuple[int, Tensor]]:
        return window_batches(tokens, self._seqlen, self._device)

    def _counted(self, batches: Iterable[_Batch], work: float) -> Iterator[_Batch]:
        """The batches; `work` is done with each row of their last tensor."""
        return self._meter.each(self._what, PASS, batches, lambda batch: work * len(batch[-1]))

    def _windows(self, work: float) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(first row, inputs in this model, inputs in the unrounded one) of whole windows.

        Both inputs have the shape (windows, S, D). `work` is done with each token.
        """
        shape = (-1, self._seqlen, self._config.hidden_size)
        for start, x in self._counted(self._batches(self._rounded.before), work):
            exact = None
            if self._exact is not None:
                exact = self._exact.before.read(start, start + len(x)).to(self._device).view(shape)
            yield start, x.view(shape), exact

    def _expert_inputs(
        self, expert: int, routes: Routes, work: float
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """The expert's inputs [n, D], the unrounded model's inputs, and the token weights."""
        norm = self._norm("post_attention_layernorm")
        token, slot = torch.where(routes.ids == expert)
        score = routes.weights[token, slot]
        weights = {"none": torch.ones_like(score), "score": score, "square": score.square()}
        batches = token_batches(token, weights[self._options.weighting])
        for index, token_weights in self._counted(batches, work):
            x = norm(self._rounded.after.rows(index).to(self._device))
            exact = None
            if self._exact is not None:
                exact = norm(self._exact.after.rows(index).to(self._device))
            yield x, exact, token_weights.to(self._device)
