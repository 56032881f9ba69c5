"""The files of a calibrated run: one shard for each layer, and the tokens between the layers.

Whatever a finished layer has written stays, so a killed run continues there and ends with the same
bytes. Shape letters: T calibration tokens, D hidden width. Knows nothing of settings or of time.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from qmix.errors import CheckpointError
from qmix.formats import Checkpoint
from qmix.formats.files import manifest, shard_index
from qmix.formats.files.shard_names import shard_name
from qmix.formats.files.shard_writer import ShardWriter
from qmix.formats.names import ModelTensor
from qmix.nn.embedding import embedding
from qmix.planning import quantize_cost
from qmix.processes.group import ALONE, Group
from qmix.quantize.calibrated import expert_sum, loss_gradients
from qmix.quantize.calibrated.activations import Activations
from qmix.quantize.calibrated.array_memory import fitting_device
from qmix.quantize.calibrated.expert_sum import ExpertSum, KeptApart, SummedAtOnce
from qmix.quantize.calibrated.layer import LayerQuantizer
from qmix.quantize.calibrated.layer_gradients import LayerGradients
from qmix.quantize.calibrated.layer_work import LayerWork
from qmix.quantize.calibrated.options import CalibratedOptions
from qmix.quantize.calibrated.resume import START_AGAIN, RunState, damaged_files
from qmix.quantize.calibrated.rounded_tensor import RoundedTensor
from qmix.quantize.calibrated.token_stream import TokenStream
from qmix.quantize.calibrated.windows import Calibration
from qmix.quantize.output_checkpoint import OutputTensor, file_tensors, read_finite
from qmix.quantize.report import TensorResult
from qmix.weights.dense import Dense, Weight
from qmix.weights.scheme import Recipe
from qmix.work_meter import WorkMeter

_EMBEDDED_TOKENS = 8192  # embedded at a time
_SCRATCH = "sum.writing"


class RunFiles:
    """Writes the shards of one run, layer by layer, into a folder.

    Attributes:
        group: the processes that share each layer. The first one writes the shards; the others
            call `follow_layer` when it calls `quantize_layer`.
        bytes_in: of the source's tensors. bytes_out: of the output's.
        token_bytes: of all arrays of tokens that exist at once.
        gradient_bytes: of the files of the backward pass, if there is one.
        in_memory: whether the tokens are kept in memory; if not, in files.
        digests: SHA-256 of the files that were written or checked, by name; see `RunState`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        outputs: Sequence[OutputTensor],
        recipe: Recipe,
        calibration: Calibration,
        options: CalibratedOptions,
        group: Group = ALONE,
    ) -> None:
        self.group = group
        self.checkpoint, self.outputs, self.recipe = checkpoint, outputs, recipe
        self.ids, self.options = calibration.ids, options
        self.width = checkpoint.config.hidden_size
        self.layers = checkpoint.config.num_hidden_layers
        self.bytes_in = sum(checkpoint.stored_bytes(output.tensor) for output in outputs)
        self.bytes_out = sum(output.nbytes for output in outputs)
        self.streams = ("tokens", "exact") if options.layer.correct else ("tokens",)
        self.token_bytes = quantize_cost.token_bytes(
            checkpoint.config, self.ids.numel(), correct=options.layer.correct
        )
        if group.size > 1 and options.layer.correct:  # see `KeptApart`
            apart = checkpoint.config.num_experts_per_tok - 1
            self.token_bytes += 4 * apart * self.ids.numel() * self.width
        self.gradient_bytes = 0
        if options.layer.objective == "loss":
            self.gradient_bytes = loss_gradients.disk_bytes(checkpoint, self.ids)
        self.array_device, self.in_memory = torch.device("cpu"), False
        if group.size == 1:
            self.array_device = fitting_device(options.device, self.token_bytes)
            on_device = self.array_device.type != "cpu"
            self.in_memory = on_device or self.token_bytes <= options.activation_bytes
        self.digests: dict[str, str] = {}

    def work(self, layers: Sequence[int]) -> dict[str, float]:
        """The work of rounding these layers, by kind."""
        return self.work_of_a_layer.totals(layers, self.ids.numel(), self.recipe)

    @property
    def work_of_a_layer(self) -> LayerWork:
        """How much work the parts of a layer are."""
        options, window = self.options, self.ids.shape[1]
        return LayerWork(self.checkpoint.config, options.layer, window, options.device)

    def finished(self, folder: Path, state: RunState) -> list[list[TensorResult]]:
        """The results of the layers that an earlier run finished.

        Raises:
            CheckpointError: `state` holds something else.
        """
        names = [
            [output.tensor.name for output in self.layer_outputs(layer)]
            for layer in range(self.layers)
        ]
        done: list[list[TensorResult]] | None = None
        with suppress(TypeError, KeyError):
            done = [[TensorResult.from_dict(r) for r in results] for results in state.results]
        if done is None or [[r.name for r in results] for results in done] != names[: len(done)]:
            raise CheckpointError(
                "not the results of layers",
                where=str(folder / manifest.STATE),
                remedy=START_AGAIN,
            )
        return done

    def enter(self, folder: Path, done: int) -> dict[str, Activations]:
        """The tokens before layer `done`, by stream: "tokens", and "exact" with correction."""
        count = self.ids.numel()
        if done:
            return {
                stream: Activations.load(
                    folder / _tokens_name(stream, done),
                    count,
                    self.width,
                    in_memory=self.in_memory,
                    device=self.array_device,
                )
                for stream in self.streams
            }
        (tensor,) = (o.tensor for o in self.outputs if o.tensor.kind == "embedding")
        table = Dense(read_finite(self.checkpoint, tensor).float())
        tokens = {
            stream: self._new_array(folder / _tokens_name(stream, 0)) for stream in self.streams
        }
        flat = self.ids.view(-1)
        for start in range(0, count, _EMBEDDED_TOKENS):
            embedded = embedding(flat[start : start + _EMBEDDED_TOKENS], table, torch.float32)
            for array in tokens.values():
                array.write(start, embedded)
        return tokens

    def layer_shard(self, layer: int) -> str:
        """The name of a layer's shard."""
        return shard_name(layer + 1, self.layers + 2)

    def layer_outputs(self, layer: int) -> list[OutputTensor]:
        """What becomes of the tensors of a layer."""
        return [output for output in self.outputs if output.tensor.layer == layer]

    def quantize_layer(
        self,
        folder: Path,
        layer: int,
        tokens: Mapping[str, Activations],
        meter: WorkMeter,
    ) -> tuple[Sequence[RoundedTensor], dict[str, Activations]]:
        """Round one layer. Its tensors and the tokens after it are still to be written."""
        planned = self.work([layer])
        left = {kind: meter.left[kind] - planned[kind] for kind in planned}
        after = self._arrays_after(folder, layer, shared=self.group.size > 1)
        self.group.told(("layer", layer))
        rounded = self._quantizer(folder, layer, tokens, after, meter, self.group).quantize()
        meter.drop({kind: meter.left[kind] - left[kind] for kind in left})  # what others did
        return rounded, after

    def write_layer(
        self, folder: Path, layer: int, rounded: Sequence[RoundedTensor]
    ) -> list[TensorResult]:
        """Put the shard of a layer on the disk."""
        return self._write_shard(folder, layer + 1, self.layer_outputs(layer), iter(rounded))

    def follow_layer(self, folder: Path, layer: int, meter: WorkMeter) -> None:
        """Do this process's part of a layer that the first one quantizes."""
        before = self._shared_arrays(folder, layer, "")
        after = self._shared_arrays(folder, layer + 1, ".writing")
        self._quantizer(folder, layer, before, after, meter, self.group).quantize()

    def pass_layer(
        self,
        folder: Path,
        layer: int,
        tokens: Mapping[str, Activations],
        weights: Mapping[str, Weight],
        meter: WorkMeter,
    ) -> dict[str, Activations]:
        """Run the tokens through a layer that was rounded to `weights` before."""
        after = self._arrays_after(folder, layer, shared=False)
        self._quantizer(folder, layer, tokens, after, meter, ALONE).run(weights)
        return after

    def _shared_arrays(self, folder: Path, done: int, suffix: str) -> dict[str, Activations]:
        """The tokens after `done` layers, in files that the first process made."""
        return {
            name: Activations(
                self.ids.numel(),
                self.width,
                folder / f"{_tokens_name(name, done)}{suffix}",
                shared=True,
            )
            for name in self.streams
        }

    def _arrays_after(self, folder: Path, layer: int, *, shared: bool) -> dict[str, Activations]:
        """Where the tokens after a layer will be."""
        return {
            stream: self._new_array(
                folder / f"{_tokens_name(stream, layer + 1)}.writing", shared=shared
            )
            for stream in self.streams
        }

    def _quantizer(
        self,
        folder: Path,
        layer: int,
        tokens: Mapping[str, Activations],
        after: Mapping[str, Activations],
        meter: WorkMeter,
        group: Group,
    ) -> LayerQuantizer:
        """What rounds a layer."""
        streams = {name: TokenStream(tokens[name], after[name]) for name in self.streams}
        exact: tuple[TokenStream, ExpertSum] | None = None
        if "exact" in streams:
            at_once = group.size == 1
            exact = (
                streams["exact"],
                (
                    SummedAtOnce(self._new_array(folder / _SCRATCH))
                    if at_once
                    else KeptApart(folder, self.width)
                ),
            )
        return LayerQuantizer(
            self.checkpoint,
            layer,
            streams["tokens"],
            exact,
            seqlen=self.ids.shape[1],
            recipe=self.recipe,
            options=self.options.layer,
            device=self.options.device,
            dtype=self.options.forward_dtype,
            meter=meter,
            gradients=self._gradients(folder, layer),
            group=group,
        )

    def _gradients(self, folder: Path, layer: int) -> LayerGradients | None:
        """What the backward pass left of a layer; None unless that is the objective.

        Raises:
            CheckpointError: it is gone: the last layer had been finished.
        """
        if self.options.layer.objective != "loss":
            return None
        path = folder / loss_gradients.moments_name(layer)
        if not path.is_file():
            raise CheckpointError("missing", where=str(path), remedy=START_AGAIN)
        return LayerGradients.read(path, self.options.device)

    def save_tokens(self, folder: Path, layer: int, after: Mapping[str, Activations]) -> None:
        """Put the tokens after a layer on the disk, the streams side by side."""
        names = [_tokens_name(stream, layer + 1) for stream in after]
        with ThreadPoolExecutor(len(names)) as threads:
            save = [
                threads.submit(array.save, folder / name)
                for name, array in zip(names, after.values(), strict=True)
            ]
        self.digests |= {name: each.result() for name, each in zip(names, save, strict=True)}
        (folder / _SCRATCH).unlink(missing_ok=True)
        expert_sum.remove_outputs(folder)

    def remove_tokens(self, folder: Path, done: int) -> None:
        """Remove the tokens that the layers after `done` no longer need."""
        for stream in self.streams:
            (folder / _tokens_name(stream, done - 1)).unlink(missing_ok=True)

    def write_ends(self, folder: Path) -> tuple[list[TensorResult], list[TensorResult]]:
        """Write the shards before and after the layers, and the index."""
        before, after = (
            [output for output in self.outputs if self._shard(output.tensor) == index]
            for index in (0, self.layers + 1)
        )
        results = (
            self._write_shard(folder, 0, before, self._unchanged(before)),
            self._write_shard(folder, self.layers + 1, after, self._unchanged(after)),
        )
        weight_map = {
            planned.name: shard_name(self._shard(output.tensor), self.layers + 2)
            for output in self.outputs
            for planned in output.planned
        }
        shard_index.write_index(folder, weight_map, self.bytes_out)
        return results

    def check_shards(self, folder: Path) -> None:
        """Raise if a shard is not what was written, before the manifest takes its hash.

        Raises:
            CheckpointError: one changed on the disk.
        """
        names = [shard_name(index, self.layers + 2) for index in range(self.layers + 2)]
        for found in damaged_files(folder, {name: self.digests[name] for name in names}):
            raise found.error()

    def remove_others(self, folder: Path, done: int) -> None:
        """Remove all but the shards of `done` layers and the tokens that the next one needs."""
        needed = {*self.needed(done), manifest.STATE}
        for path in folder.iterdir():
            if path.name not in needed and not path.name.startswith("."):
                path.unlink()

    def needed(self, done: int) -> dict[str, str]:
        """SHA-256 of what the layers after `done` build on: the shards, and the tokens."""
        names = [self.layer_shard(layer) for layer in range(done)]
        if 0 < done < self.layers:
            names += [_tokens_name(stream, done) for stream in self.streams]
        if done < self.layers and self.options.layer.objective == "loss":
            names += [loss_gradients.moments_name(layer) for layer in range(self.layers)]
        return {name: self.digests[name] for name in names}

    def _new_array(self, path: Path, *, shared: bool = False) -> Activations:
        path.unlink(missing_ok=True)
        return Activations(
            self.ids.numel(),
            self.width,
            None if self.in_memory else path,
            device=self.array_device,
            shared=shared,
        )

    def _shard(self, tensor: ModelTensor) -> int:
        if tensor.layer is not None:
            return tensor.layer + 1
        return 0 if tensor.kind == "embedding" else self.layers + 1

    def _unchanged(self, outputs: Sequence[OutputTensor]) -> Iterator[RoundedTensor]:
        for output in outputs:
            data = read_finite(self.checkpoint, output.tensor)
            yield RoundedTensor(tensor=output.tensor, weight=Dense(data))

    def _write_shard(
        self,
        folder: Path,
        index: int,
        outputs: Sequence[OutputTensor],
        rounded: Iterator[RoundedTensor],
    ) -> list[TensorResult]:
        name = shard_name(index, self.layers + 2)
        partial = folder / f"{name}.writing"
        partial.unlink(missing_ok=True)
        results = []
        planned = [planned for output in outputs for planned in output.planned]
        digest = hashlib.sha256()
        with ShardWriter(partial, planned, digest) as writer:
            for output, tensor in zip(outputs, rounded, strict=True):
                assert tensor.tensor == output.tensor
                tensors = file_tensors(tensor.weight, output)
                for tensor_name, data in tensors.items():
                    writer.write(tensor_name, data)
                results.append(self._result(output, tensor, tensors))
        partial.rename(folder / name)
        self.digests[name] = digest.hexdigest()
        return results

    def _result(
        self, output: OutputTensor, rounded: RoundedTensor, tensors: Mapping[str, Tensor]
    ) -> TensorResult:
        solution, (squared_error, squared_norm) = rounded.solution, rounded.squared
        return TensorResult(
            name=output.tensor.name,
            kind=output.tensor.kind,
            scheme=output.scheme,
            parameters=math.prod(output.tensor.shape),
            bytes_out=sum(tensor.nbytes for tensor in tensors.values()),
            squared_error=squared_error,
            squared_norm=squared_norm,
            seconds=rounded.seconds,
            tokens=rounded.tokens,
            output_error=solution.output_error if solution else None,
            damping=solution.damping if solution else None,
            raised=solution.raised if solution else 0,
            fallback=solution.fallback if solution else None,
        )


def _tokens_name(stream: str, done: int) -> str:
    """The file of a stream's tokens after `done` layers."""
    return f"{stream}-{done:05d}.f32"
