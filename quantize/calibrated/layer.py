"""One decoder layer, rounded by GPTQ for the inputs that it really gets.

The order is q, k and v; o; w1 and w3 of every expert; w2. Each matrix sees what the rounded
matrices before it compute, and tokens are routed by what the rounded attention feeds the router.
The unrounded model runs beside it on the same tokens, and each matrix is fitted to *its* outputs
(https://arxiv.org/abs/2504.02692), so that a layer takes back part of the errors of earlier layers.

One expert is in memory at a time. Several processes share the windows and the experts of a layer;
the attention is rounded by one of them. Shape letters: T tokens, S window, D hidden width, F expert
width, E experts, K inputs of a matrix, n tokens of a batch. Knows the checkpoint, but no other
files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.errors import CheckpointError
from qmix.formats import Checkpoint
from qmix.kernels import Routes
from qmix.nn.attention import Attention, ForwardContext
from qmix.nn.linear import Linear, RMSNorm
from qmix.nn.moe import ACTIVATIONS, SparseMoeBlock
from qmix.processes.group import ALONE, Group
from qmix.quantize.calibrated.activations import Activations
from qmix.quantize.calibrated.array_memory import experts_at_once
from qmix.quantize.calibrated.expert_sum import ExpertSum
from qmix.quantize.calibrated.layer_gradients import InnerGradients, LayerGradients
from qmix.quantize.calibrated.layer_tensors import LayerTensors, RoundingJob
from qmix.quantize.calibrated.layer_work import PASS, LayerWork
from qmix.quantize.calibrated.options import LayerOptions
from qmix.quantize.calibrated.rounded_tensor import RoundedTensor
from qmix.quantize.calibrated.shared_windows import SharedWindows
from qmix.quantize.calibrated.token_stream import TokenStream, token_batches
from qmix.quantize.rounding.hessian import Moments
from qmix.weights.dense import Weight, all_finite
from qmix.weights.scheme import Recipe
from qmix.work_meter import WorkMeter

_PARTS = ("w1", "w2", "w3")
_Batch = TypeVar("_Batch", bound=tuple[Any, ...])


class LayerQuantizer:
    """Rounds layer `layer` and runs the calibration tokens through the result.

    Args:
        rounded: the tokens of the model that is being rounded, in windows of `seqlen`.
        gradients: of the loss at the end; None unless they are the objective.
        exact: the tokens of the unrounded model, and the sum of its experts' outputs; None without
            correction.
        device: where everything is computed.
        dtype: of forward passes; what is summed or solved is float32.
        meter: counts the work; LayerWork says how much there is.
        group: the processes that share the layer; each of them calls the same methods, and tokens
            lie in files that all of them see.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: int,
        rounded: TokenStream,
        exact: tuple[TokenStream, ExpertSum] | None,
        *,
        seqlen: int,
        recipe: Recipe,
        options: LayerOptions,
        device: torch.device,
        dtype: torch.dtype,
        meter: WorkMeter,
        gradients: LayerGradients | None = None,
        group: Group = ALONE,
    ) -> None:
        assert options.correct == (exact is not None)
        self._checkpoint, self._config = checkpoint, checkpoint.config
        self._layer, self._base = layer, f"model.layers.{layer}"
        self._rounded, self._seqlen = rounded, seqlen
        self._exact = None if exact is None else exact[0]
        self._expert_sum = None if exact is None else exact[1]
        self._recipe, self._options = recipe, options
        self._device, self._dtype = device, dtype
        self._meter, self._work = meter, LayerWork(checkpoint.config, options, seqlen, device)
        self._what = f"layer {layer + 1} of {self._config.num_hidden_layers}"
        self._gradients, self._group = gradients, group
        self._windows = SharedWindows(rounded, self._exact, seqlen, device, group, self._counted)
        self._tensors = LayerTensors(
            checkpoint,
            layer,
            recipe,
            self._work,
            device=device,
            dtype=dtype,
            meter=meter,
            processes=group.size,
        )

    @torch.no_grad()
    def quantize(self) -> tuple[RoundedTensor, ...]:
        """Round every tensor of the layer and return them in the model's order.

        Raises:
            CheckpointError: a weight or an activation is not finite.
        """
        self._round_attention()
        routes = self._route(self._rounded.after)
        exact_routes = self._route(self._exact.after) if self._exact else None
        experts = self._group.share(range(self._config.num_local_experts))
        step = experts_at_once(self._config, self._options, self._device)
        for first in range(0, len(experts), step):
            self._round_experts(experts[first : first + step], routes, exact_routes)
        self._exchange([self._expert(expert, part) for expert in experts for part in _PARTS])
        self._add_experts(exact_routes)
        self._group.wait()
        return self._tensors.results

    @torch.no_grad()
    def run(self, weights: Mapping[str, Weight]) -> None:
        """Take the tokens through the layer as `quantize` does, with weights rounded before.

        Args:
            weights: by name; the others stay as they are in the checkpoint.
        """
        self._tensors.take(weights)
        self._run_attention()
        routes = self._route(self._exact.after) if self._exact else None
        if routes is not None:
            for expert in range(self._config.num_local_experts):
                names = [self._expert(expert, part) for part in ("w1", "w3")]
                inner = self._swiglu(*(self._tensors.exact(name) for name in names))
                self._sum_exact(expert, inner, routes)
                self._tensors.let_go()
        self._add_experts(routes)

    def _run_attention(self) -> None:
        """Leave the input plus the attention's output in `after`, for both models."""
        norm, context = self._norm("input_layernorm"), self._context()
        with torch.device("meta"):
            attention, exact = (Attention(self._config, self._layer) for _ in range(2))
        for part in "qkvo":
            name = f"{self._base}.self_attn.{part}_proj.weight"
            self._tensors.store(attention.get_submodule(f"{part}_proj"), name)
            if self._exact is not None:
                linear = exact.get_submodule(f"{part}_proj")
                assert isinstance(linear, Linear)
                linear.store(self._tensors.exact(name))
        for start, x, e in self._windows.each(self._work.both_attentions):
            self._rounded.after.write(start, (x + attention(norm(x), context)).flatten(0, 1))
            if e is not None:
                assert self._exact is not None
                self._exact.after.write(start, (e + exact(norm(e), context)).flatten(0, 1))

    def _round_attention(self) -> None:
        """Round q, k, v, then o, unless all stay dense; leave input plus output in `after`."""
        names = [f"{self._base}.self_attn.{part}_proj.weight" for part in "qkvo"]
        if all(self._recipe.scheme_of(name).kind == "dense" for name in names):
            for name in names:
                self._tensors.leave_dense(name)
            self._run_attention()
            return
        norm, context = self._norm("input_layernorm"), self._context()
        with torch.device("meta"):
            attention, exact = (Attention(self._config, self._layer) for _ in range(2))
        for name in names if self._exact else names[3:]:
            linear = exact.get_submodule(name.split(".")[-2])
            assert isinstance(linear, Linear)
            linear.store(self._tensors.exact(name))
        width = self._config.hidden_size
        moments = self._windows.summed(
            lambda: self._moments(width),
            self._work.moments(width),
            lambda sums, _, x, e: sums.add(norm(x), exact=None if e is None else norm(e)),
        )
        self._round_first(names[:3], moments, self._of_outputs("qkv"))
        for name in names[:3]:
            self._tensors.store(attention.get_submodule(name.split(".")[-2]), name)

        attention.o_proj.store(exact.o_proj.stored)
        o_inputs: list[Tensor] = []
        hooks = [
            module.o_proj.register_forward_pre_hook(lambda _, args: o_inputs.append(args[0]))
            for module in (attention, exact)
        ]

        def attend(sums: Moments, start: int, x: Tensor, e: Tensor | None) -> None:
            attention(norm(x), context)
            if e is not None:
                assert self._exact is not None
                self._exact.after.write(start, (e + exact(norm(e), context)).flatten(0, 1))
            sums.add(o_inputs[0], exact=o_inputs[1] if e is not None else None)
            o_inputs.clear()

        heads = attention.o_proj.in_features
        work = self._work.both_attentions + self._work.moments(heads)
        moments = self._windows.summed(lambda: self._moments(heads), work, attend)
        for hook in hooks:
            hook.remove()
        self._round_first(names[3:], moments, self._of_outputs("attention"))
        self._tensors.store(attention.o_proj, names[3])
        for start, x, _ in self._windows.each(self._work.attention):
            self._rounded.after.write(start, (x + attention(norm(x), context)).flatten(0, 1))

    def _round_first(
        self, names: Sequence[str], moments: Moments, gradients: Tensor | None
    ) -> None:
        """Round matrices of the attention, a hundredth of a layer's, in the first process."""
        mine = names if self._group.is_first else []
        if mine:
            self._tensors.round([RoundingJob(mine, moments, gradients)])
        self._exchange(mine)

    def _exchange(self, mine: Sequence[str]) -> None:
        """Give the tensors that were rounded here to the other processes, and take theirs."""
        self._tensors.accept(self._group.gathered(self._tensors.of(mine)))

    def _route(self, tokens: Activations) -> Routes:
        """The router's choice for each token, on the CPU."""
        norm, gate = self._norm("post_attention_layernorm"), self._gate()
        mine = [
            kernels.route(gate(norm(x)), self._config.num_experts_per_tok)
            for _, x in self._windows.read(tokens)
        ]
        routes = self._group.gathered([(batch.ids.cpu(), batch.weights.cpu()) for batch in mine])
        ids, weights = zip(*routes, strict=True)
        return Routes(torch.cat(ids), torch.cat(weights))

    def _round_experts(
        self, experts: Sequence[int], routes: Routes, exact_routes: Routes | None
    ) -> None:
        """Round w1 and w3 of each expert for the same inputs, then w2 for what the two compute."""
        jobs = []
        for expert in experts:
            jobs += self._inner_jobs(expert, routes)
        if len(experts) > 1:
            self._tensors.round(jobs)
        else:  # w1 and w3 one after the other: all that one of them needs may have 5 GB
            for job in jobs:
                self._tensors.round([job])
        jobs = []
        for expert in experts:
            names = [self._expert(expert, part) for part in ("w1", "w3")]
            exact: Callable[[Tensor], Tensor] | None = None
            if exact_routes is not None:
                exact = self._swiglu(*(self._tensors.exact(name) for name in names))
                self._sum_exact(expert, exact, exact_routes)
            inner = self._swiglu(*(self._tensors.rounded(name) for name in names))
            moments = self._moments(self._config.intermediate_size)
            work = self._work.inner_moments
            for x, e, token_weights in self._expert_inputs(expert, routes, work):
                exact_inner = exact(e) if exact and e is not None else None
                moments.add(inner(x), token_weights, exact=exact_inner)
            down = [self._expert(expert, "w2")]
            jobs.append(RoundingJob(down, moments, self._of_outputs("experts")))
            del exact, inner  # 0.7 GB
        self._tensors.round(jobs)
        self._tensors.let_go()

    def _inner_jobs(self, expert: int, routes: Routes) -> list[RoundingJob]:
        """w1 and w3 of an expert: together, or with gradients of each of them."""
        moments = self._moments(self._config.hidden_size)
        work = self._work.moments(self._config.hidden_size)
        names = [self._expert(expert, part) for part in ("w1", "w3")]
        inner = None
        if self._gradients is not None:
            w1, w2, w3 = (
                self._tensors.exact(self._expert(expert, part)) for part in ("w1", "w2", "w3")
            )
            inner = InnerGradients(w1, w2, w3, ACTIVATIONS[self._config.hidden_act])
            work += self._work.inner_gradients
        for x, e, token_weights in self._expert_inputs(expert, routes, work):
            moments.add(x, token_weights, exact=e)
            if inner is not None:
                inner.add(x if e is None else e, token_weights)
        if inner is None or self._gradients is None:
            return [RoundingJob(names, moments)]
        of_w1, of_w3 = inner.of_outputs(self._gradients.experts)
        return [
            RoundingJob(names[:1], moments, of_w1),
            RoundingJob(names[1:], moments.copy(), of_w3),
        ]

    def _sum_exact(self, expert: int, inner: Callable[[Tensor], Tensor], routes: Routes) -> None:
        """Add the unrounded expert's outputs for its own tokens to the sum over experts."""
        assert self._exact is not None
        assert self._expert_sum is not None
        down = self._tensors.exact(self._expert(expert, "w2"))
        norm = self._norm("post_attention_layernorm")
        token, slot = torch.where(routes.ids == expert)
        batches, first = token_batches(token, routes.weights[token, slot]), 0
        for index, score in self._counted(batches, self._work.expert):
            x = norm(self._exact.after.rows(index).to(self._device))
            y = kernels.linear(inner(x), down) * score.to(self._device)[:, None]
            self._expert_sum.add(expert, token, first, y)
            first += len(index)

    def _add_experts(self, exact_routes: Routes | None) -> None:
        """Add the experts' outputs to `after` of both models."""
        norm = self._norm("post_attention_layernorm")
        with torch.device("meta"):
            moe = SparseMoeBlock(self._config)
        moe.gate = self._gate()
        for expert in range(self._config.num_local_experts):
            for part in _PARTS:
                name = self._expert(expert, part)
                self._tensors.store(moe.get_submodule(f"experts.{expert}.{part}"), name)
        moe.eval()
        work = self._config.num_experts_per_tok * self._work.expert
        for start, x in self._counted(self._windows.read(self._rounded.after), work):
            y, _ = moe(norm(x)[None])
            self._write(self._rounded.after, start, x + y[0])
        if exact_routes is not None:
            assert self._exact is not None
            assert self._expert_sum is not None
            for start, x in self._windows.read(self._exact.after):
                y = self._expert_sum.read(start, start + len(x), exact_routes).to(self._device)
                self._write(self._exact.after, start, x + y)

    def _write(self, target: Activations, start: int, values: Tensor) -> None:
        if not all_finite(values):
            raise CheckpointError(
                f"the activations after layer {self._layer} are not finite",
                where=str(self._checkpoint.shards.directory),
                remedy="The checkpoint is damaged.",
            )
        target.write_final(start, values)

    def _of_outputs(self, part: Literal["qkv", "attention", "experts"]) -> Tensor | None:
        """A part of the gradients, if there are any."""
        found: Tensor | None = getattr(self._gradients, part, None)
        return found

    def _expert(self, expert: int, part: str) -> str:
        return f"{self._base}.block_sparse_moe.experts.{expert}.{part}.weight"

    def _moments(self, width: int) -> Moments:
        return Moments(width, self._device, crossed=self._options.correct)

    def _swiglu(self, gate: Weight, up: Weight) -> Callable[[Tensor], Tensor]:
        act = ACTIVATIONS[self._config.hidden_act]
        return lambda x: act(kernels.linear(x, gate)) * kernels.linear(x, up)

    def _norm(self, part: str) -> Callable[[Tensor], Tensor]:
        """A norm in float32, whose outputs have the dtype of forward passes."""
        name = f"{self._base}.{part}.weight"
        weight = self._tensors.as_it_is(name)
        norm = RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        norm.weight = nn.Parameter(weight.data.float())
        norm.to(self._device)
        return lambda x: norm(x).to(self._dtype)

    def _gate(self) -> Linear:
        name = f"{self._base}.block_sparse_moe.gate.weight"
        self._tensors.as_it_is(name)
        with torch.device("meta"):
            gate = Linear(self._config.hidden_size, self._config.num_local_experts)
        self._tensors.store(gate, name)
        return gate

    def _context(self) -> ForwardContext:
        return ForwardContext.without_past(self._config, self._seqlen, self._device, self._dtype)

    def _counted(self, batches: Iterable[_Batch], work: float) -> Iterator[_Batch]:
        """The batches; `work` is done with each row of their last tensor, in each process."""
        work *= self._group.size
        return self._meter.each(self._what, PASS, batches, lambda batch: work * len(batch[-1]))

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
