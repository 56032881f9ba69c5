"""One backward pass through the exact model, a layer at a time: how the end of the model feels it.

The loss is KL(exact || changed) of the next token's distribution p. Its second derivative with
respect to the logits is `diag(p) - p p^T`, which is the mean of `v v^T` for `v = r - p sum(r)`,
r = sqrt(p) with random signs. Such a v goes back through the model in place of a gradient; the mean
of `g g^T` over the g that it becomes is the second derivative with respect to what g belongs to,
as far as the model is linear (the Fisher information; random signs scatter less than drawn tokens).

Hidden states before each layer and the gradient in front of the layer at work lie in files, with
one layer's weights in memory. Each step leaves its files behind, so a killed run continues there.
Shape letters: W windows, S window, T = W S tokens, D hidden width, V vocabulary. Knows nothing of
rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.formats import Checkpoint, names
from qmix.nn.attention import ForwardContext
from qmix.nn.decoder_layer import DecoderLayer
from qmix.nn.embedding import embedding
from qmix.nn.linear import RMSNorm
from qmix.nn.stored import StoredModule
from qmix.planning import quantize_cost
from qmix.planning.quantize_cost import GRADIENT_TOKENS
from qmix.processes.group import ALONE, Group
from qmix.quantize.calibrated.activations import Activations
from qmix.quantize.calibrated.layer_gradients import LayerGradients
from qmix.quantize.calibrated.layer_work import PASS, LayerWork
from qmix.quantize.calibrated.options import CalibratedOptions
from qmix.quantize.calibrated.token_stream import (
    batches_of_windows,
    read_batches,
    summed_parts,
)
from qmix.quantize.calibrated.windows import thinned
from qmix.quantize.output_checkpoint import read_finite
from qmix.quantize.rounding.hessian import add_symmetric
from qmix.weights.dense import Dense
from qmix.work_meter import WorkMeter

_DTYPE = torch.bfloat16  # of states and gradients between layers
_BATCH_TOKENS = 2048  # that autograd remembers: 3 GB at F = 14336
_POSITIONS = 512  # of logits at a time: 66 MB at V = 32000
_SEED = 0  # of the random signs

_Batch = TypeVar("_Batch")


class LossGradients:
    """The backward pass of one run.

    Args:
        ids: int64 (W, S), the calibration windows; evenly chosen ones of GRADIENT_TOKENS are used.
        folder: where the files are.
        digests: SHA-256 of the files that earlier steps left, by name; kept up to date.
        keep: called after each step with the files that the next steps need.
        group: the processes that share the windows of each layer. The first one calls `run`, the
            others `follow_forward` and `follow_back` as it tells them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Tensor,
        options: CalibratedOptions,
        folder: Path,
        digests: dict[str, str],
        keep: Callable[[Mapping[str, str]], None],
        meter: WorkMeter,
        group: Group = ALONE,
    ) -> None:
        self._checkpoint, self._config = checkpoint, checkpoint.config
        self._ids, self._folder = thinned(ids, GRADIENT_TOKENS), folder
        self._device, self._dtype = options.device, options.forward_dtype
        self._digests, self._keep, self._meter, self._group = digests, keep, meter, group
        self._batches = batches_of_windows(self._ids.numel(), ids.shape[1], _BATCH_TOKENS)
        work = LayerWork(checkpoint.config, options.layer, ids.shape[1], options.device)
        pairs = checkpoint.config.num_experts_per_tok
        self._work_of_layer = work.attention + pairs * work.expert  # for each token
        in_memory = scratch_bytes(checkpoint, ids) <= options.activation_bytes
        self._in_memory = in_memory and group.size == 1
        self._arrays: dict[str, Activations] = {}
        self._tensors = {tensor.name: tensor for tensor in checkpoint.tensors}

    def run(self) -> None:
        """Leave the file `moments_name(layer)` of every layer.

        Raises:
            CheckpointError: a weight holds NaN or infinity.
        """
        forward, back = self._steps_left()
        self._meter.plan(
            {PASS: self._ids.numel() * self._work_of_layer * (len(forward) + 3 * len(back))}
        )
        if back and _gradient_name(back[-1] + 1) not in self._digests:
            self._enter()
            for layer in forward:
                self._go_forward(layer)
            self._start_backward()
        for layer in reversed(back):
            self._go_back(layer)

    def _steps_left(self) -> tuple[list[int], list[int]]:
        """The layers that are still to be passed forward, and back."""
        layers, done = range(self._config.num_hidden_layers), self._digests
        back = [layer for layer in layers if moments_name(layer) not in done]
        if not back or _gradient_name(back[-1] + 1) in done:
            return [], back
        return [layer for layer in layers if _states_name(layer + 1) not in done], back

    def _enter(self) -> None:
        """Keep the embedded tokens."""
        if _states_name(0) in self._digests:
            return
        (tensor,) = (t for t in self._checkpoint.tensors if t.kind == "embedding")
        table = Dense(read_finite(self._checkpoint, tensor).float())
        entered = self._array(_states_name(0))
        for batch in self._batches:
            ids = self._ids.view(-1)[batch.start : batch.stop]
            entered.write_final(batch.start, embedding(ids, table, torch.float32))
        self._save(_states_name(0), drop=())

    def _go_forward(self, layer: int) -> None:
        """Keep the hidden states after a layer."""
        after = self._array(_states_name(layer + 1), shared=self._group.size > 1)
        self._group.told(("forward", layer))
        self._pass_forward(layer, after)
        self._save(_states_name(layer + 1), drop=())

    def follow_forward(self, layer: int) -> None:
        """Do this process's part of a layer's forward pass."""
        self._pass_forward(layer, self._shared_array(_states_name(layer + 1)))

    def _pass_forward(self, layer: int, after: Activations) -> None:
        module, context = self._layer(layer), self._context()
        states = self._read(_states_name(layer), self._group.share(self._batches))
        with torch.no_grad():
            for first, x in self._counted(states, layer, 1):
                after.write_final(first, module(x, context)[0].flatten(0, 1))
        self._group.wait()

    def _start_backward(self) -> None:
        """The gradient with respect to the states after the last layer."""
        layers, config = self._config.num_hidden_layers, self._config
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        norm.weight = nn.Parameter(self._weight("model.norm.weight"), requires_grad=False)
        tied = config.tie_word_embeddings
        head = Dense(self._weight("model.embed_tokens.weight" if tied else "lm_head.weight"))
        signs = torch.Generator().manual_seed(_SEED)
        target = self._array(_gradient_name(layers))
        for first, x in self._read(_states_name(layers), self._batches):
            flat = x.flatten(0, 1)
            parts = []
            for start in range(0, len(flat), _POSITIONS):
                leaf = flat[start : start + _POSITIONS].detach().requires_grad_()
                with torch.enable_grad():
                    logits = kernels.linear(norm(leaf), head)
                (part,) = torch.autograd.grad(logits, leaf, _draw(logits.detach(), signs))
                parts.append(part)
            target.write_final(first, torch.cat(parts))
        self._save(_gradient_name(layers), drop=(_states_name(layers),))

    def _go_back(self, layer: int) -> None:
        """Keep the layer's moments, and the gradient in front of the layer."""
        before = self._array(_gradient_name(layer), shared=self._group.size > 1)
        self._group.told(("back", layer))
        sums, name = self._pass_back(layer, before), moments_name(layer)
        self._digests[name] = sums.write(self._folder / name)
        self._save(_gradient_name(layer), drop=(_gradient_name(layer + 1), _states_name(layer)))

    def follow_back(self, layer: int) -> None:
        """Do this process's part of a layer's backward pass."""
        self._pass_back(layer, self._shared_array(_gradient_name(layer)))

    def _pass_back(self, layer: int, before: Activations) -> LayerGradients:
        """Write the gradient in front of a layer, and return the layer's moments.

        They are those of parts of the windows, added in their order.
        """
        module, total = self._layer(layer), LayerGradients.zeros(self._config, self._device)
        outputs: dict[str, Tensor] = {}
        for part in "qkvo":
            linear = module.self_attn.get_submodule(f"{part}_proj")
            linear.register_forward_hook(partial(_remember, outputs, part))
        for mine in self._group.rounds(summed_parts(self._batches)):
            parts = [self._back_part(layer, module, outputs, batches, before) for batches in mine]
            for sums in self._group.gathered(parts):
                total.merge(sums)
        return total

    def _back_part(
        self,
        layer: int,
        module: DecoderLayer,
        outputs: Mapping[str, Tensor],
        rows: Sequence[range],
        before: Activations,
    ) -> LayerGradients:
        sums, context = LayerGradients.zeros(self._config, self._device), self._context()
        gradients = self._read(_gradient_name(layer + 1), rows)
        batches = zip(self._read(_states_name(layer), rows), gradients, strict=True)
        for (first, x), (_, after) in self._counted(batches, layer, 3):
            with torch.enable_grad():
                out, logits = module(x.requires_grad_(), context)
                watched = [x, *(outputs[part] for part in "qkvo")]
                found = torch.autograd.grad(out, watched, after)
            in_front, q, k, v, o = (each.flatten(0, 1) for each in found)
            routes = kernels.route(logits.detach(), self._config.num_experts_per_tok)
            shares = routes.weights.square().sum(1, keepdim=True).sqrt()
            experts = after.flatten(0, 1) * shares
            for total, values in (
                (sums.qkv, torch.cat((q, k, v), 1)),
                (sums.attention, o),
                (sums.experts, experts),
            ):
                add_symmetric(total, values.float())
            before.write_final(first, in_front)
        return sums

    def _layer(self, index: int) -> DecoderLayer:
        with torch.device("meta"):
            layer = DecoderLayer(self._config, index)
        base = f"model.layers.{index}."
        for tensor in names.layer_tensors(self._config, index):
            module = layer.get_submodule(tensor.prefix.removeprefix(base))
            data = self._weight(tensor.name)
            if isinstance(module, StoredModule):
                module.store(Dense(data))
            else:
                module.weight = nn.Parameter(data)
        return layer.requires_grad_(False).eval()

    def _weight(self, name: str) -> Tensor:
        return read_finite(self._checkpoint, self._tensors[name]).to(self._device, self._dtype)

    def _context(self) -> ForwardContext:
        window = self._ids.shape[1]
        return ForwardContext.without_past(self._config, window, self._device, self._dtype)

    def _counted(self, batches: Iterator[_Batch], layer: int, passes: int) -> Iterator[_Batch]:
        """The batches; a pass back is twice the work of one forward."""
        what = f"gradients of layer {layer + 1} of {self._config.num_hidden_layers}"
        work = passes * self._work_of_layer * self._ids.numel() / len(self._batches)
        work *= self._group.size  # the others' part
        return self._meter.each(what, PASS, batches, lambda _: work)

    def _array(self, name: str, *, shared: bool = False) -> Activations:
        path = self._folder / f"{name}.writing"
        path.unlink(missing_ok=True)
        tokens, width = self._ids.numel(), self._config.hidden_size
        self._arrays[name] = Activations(
            tokens, width, None if self._in_memory else path, dtype=_DTYPE, shared=shared
        )
        return self._arrays[name]

    def _shared_array(self, name: str) -> Activations:
        """An array that the first process has made and will save."""
        path, tokens = self._folder / f"{name}.writing", self._ids.numel()
        return Activations(tokens, self._config.hidden_size, path, dtype=_DTYPE, shared=True)

    def _read(self, name: str, batches: Sequence[range]) -> Iterator[tuple[int, Tensor]]:
        """(first row, values (W, S, D)) of batches of an array."""
        if name not in self._arrays:
            self._arrays[name] = Activations.load(
                self._folder / name,
                self._ids.numel(),
                self._config.hidden_size,
                in_memory=self._in_memory,
                dtype=_DTYPE,
            )
        shape = (-1, self._ids.shape[1], self._config.hidden_size)
        for first, rows in read_batches(self._arrays[name], batches, self._device):
            yield first, rows.view(shape).to(self._dtype)

    def _save(self, name: str, drop: tuple[str, ...]) -> None:
        """Put an array on the disk, and let go of those that nobody needs any more."""
        self._digests[name] = self._arrays[name].save(self._folder / name)
        for other in drop:
            del self._digests[other]
            self._arrays.pop(other, None)
        self._keep(self._digests)
        for other in drop:
            (self._folder / other).unlink()


def moments_name(layer: int) -> str:
    """The file of a layer's `LayerGradients`."""
    return f"gradients-{layer:05d}.safetensors"


def is_file_of_pass(name: str) -> bool:
    """Whether a file of an unfinished run belongs to the backward pass."""
    return name.startswith(("states-", "gradient"))


def scratch_bytes(checkpoint: Checkpoint, ids: Tensor) -> int:
    """Bytes of all arrays that exist at once."""
    tokens = thinned(ids, GRADIENT_TOKENS).numel()
    return quantize_cost.state_bytes(checkpoint.config, tokens)


def disk_bytes(checkpoint: Checkpoint, ids: Tensor) -> int:
    """Bytes of all files that exist at once."""
    sums = checkpoint.config.num_hidden_layers * quantize_cost.gradient_bytes(checkpoint.config)
    return scratch_bytes(checkpoint, ids) + sums


def _states_name(layer: int) -> str:
    """The file of the hidden states before a layer."""
    return f"states-{layer:05d}.bf16"


def _gradient_name(layer: int) -> str:
    """The file of the gradient with respect to the states before a layer."""
    return f"gradient-{layer:05d}.bf16"


def _remember(
    outputs: dict[str, Tensor], part: str, module: nn.Module, inputs: object, output: Tensor
) -> None:
    outputs[part] = output


def _draw(logits: Tensor, signs: torch.Generator) -> Tensor:
    """A random vector [n, V] for each row whose mean outer product is `diag(p) - p p^T`."""
    p = logits.float().softmax(-1)
    flips = torch.randint(0, 2, p.shape, generator=signs, dtype=torch.int8)
    root = p.sqrt() * flips.to(p.device).mul_(2).sub_(1)
    return (root - p * root.sum(-1, keepdim=True)).to(logits.dtype)
