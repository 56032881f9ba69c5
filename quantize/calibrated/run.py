"""GPTQ of a whole checkpoint: layer after layer, each finished layer on the disk for good.

Every layer is one shard. Besides it OUT.partial keeps the calibration tokens as the finished layers
left them, so that a killed run goes on where it stood and ends with the same bytes. Shape letters:
T calibration tokens, S window, D hidden width.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qmix
from qmix.errors import CheckpointError, InterruptedRunError, UsageError
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files import output_dir, shards
from qmix.formats.files.shard_names import SHARD_BYTES, shard_name
from qmix.formats.files.shards import ShardWriter
from qmix.formats.names import ModelTensor
from qmix.nn.decoder import embedding
from qmix.planning import budget, quantize_cost
from qmix.planning.plan import check_memory
from qmix.quantize import streaming
from qmix.quantize.calibrated import layer as layerwise
from qmix.quantize.calibrated import resume
from qmix.quantize.calibrated.activations import Activations
from qmix.quantize.calibrated.layer import LayerQuantizer, Rounded, Stream
from qmix.quantize.calibrated.windows import Calibration
from qmix.quantize.report import Effort, Report, TensorResult
from qmix.quantize.streaming import Item, Progress
from qmix.weights.dense import Dense
from qmix.weights.scheme import Recipe

_EMBEDDED_TOKENS = 8192  # looked up at a time


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a checkpoint is quantized.

    Attributes:
        layer: of the rounding.
        device: where layers are computed.
        activation_bytes: tokens that need more (two arrays of T x D float32, five with correction)
            are kept in files.
        shard_bytes: upper bound of an output file; a layer is one.
    """

    layer: layerwise.Options = field(default_factory=layerwise.Options)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    activation_bytes: int = 4 << 30
    shard_bytes: int = SHARD_BYTES


def run(
    source: Path,
    out: Path,
    recipe: Recipe,
    calibration: Calibration,
    options: Options,
    *,
    method: str = "gptq",
    resumed: bool = False,
    force: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Quantize a 16- or 32-bit checkpoint directory into a new one, by what its matrices see.

    Args:
        source, out: directories; `out` appears complete or not at all.
        recipe: which tensor gets which scheme; router, norms, embedding and head stay as they are.
        resumed: go on with the interrupted run that stands at `out`.partial, if one does.
        force: replace an existing checkpoint at `out`.
        interrupted: asked after every layer; true ends the run there.

    Raises:
        UsageError: the paths are unfit, or the interrupted run had other settings.
        CheckpointError: the source is damaged or holds NaN, or the interrupted run is damaged.
        UnsupportedError: the source is quantized already, or a scheme does not fit a weight.
        ResourceError: the disk is too small. InterruptedRunError: `interrupted` said so.
    """
    begun = time.perf_counter()
    output_dir.check_paths(source, out, force=force)
    checkpoint = open_checkpoint(source)
    items = streaming.plan(checkpoint, recipe)
    _check_shards(checkpoint, items, options.shard_bytes)
    settings = _settings(checkpoint, recipe, calibration, options, method)
    work = _Work(checkpoint, items, recipe, calibration, options)
    output_dir.check_space(out, work.bytes_needed)
    if options.device.type == "cpu":
        check_memory(work.memory)
    with output_dir.partial(out, force=force, resume=resumed) as folder:
        state = resume.read(folder, settings)
        done = work.finished(folder, state)
        layers = checkpoint.config.num_hidden_layers
        at, before = time.perf_counter(), len(done)
        work.tidy(folder, len(done))
        tokens = work.enter(folder, len(done)) if len(done) < layers else {}
        for layer in range(len(done), layers):
            results, tokens = work.layer(folder, layer, tokens, progress)
            done.append(results)
            stored = [[asdict(result) for result in results] for results in done]
            resume.State(settings, stored).write(folder)
            work.tidy(folder, len(done))
            if interrupted() and layer + 1 < layers:
                raise InterruptedRunError(
                    f"interrupted after layer {layer + 1} of {layers}, which is kept",
                    where=str(folder),
                    remedy="The same command with --resume goes on.",
                )
        rounded = layers - before, time.perf_counter() - at
        first, last = work.ends(folder)
        progress(Progress(1, 1, "checksums"))
        report = Report(
            method=method,
            tensors=(*first, *(result for results in done for result in results), *last),
            bytes_in=work.bytes_in,
            seconds=time.perf_counter() - begun,
            effort=_effort(checkpoint, calibration, options, *rounded) if rounded[0] else None,
        )
        named = ("calibration", "rounding", "weighting", "correction")
        facts = {name: settings[name] for name in named}
        streaming.finish(folder, checkpoint, items, report, facts)
    return report


def _effort(
    checkpoint: Checkpoint, calibration: Calibration, options: Options, layers: int, seconds: float
) -> Effort:
    rounding = options.layer.rounding
    work = quantize_cost.work(
        checkpoint.config,
        calibration.ids.numel(),
        correct=options.layer.correct,
        refine=rounding.refine,
    )
    return Effort(
        layers=layers,
        layer_seconds=seconds,
        layer_flops=work.flops,
        peak_bytes=work.peak_bytes,
        resident_bytes=_resident_bytes(),
        gpu_seconds=work.gpu_seconds(32),
        gpu_flops=quantize_cost.GPU_FLOPS,
    )


def _resident_bytes() -> int | None:
    """The most that this process ever held; None where /proc does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None


def _check_shards(checkpoint: Checkpoint, items: Sequence[Item], limit: int) -> None:
    largest = max(_bytes(items, layer) for layer in range(checkpoint.config.num_hidden_layers))
    if largest > limit:
        raise UsageError(
            "a layer is one file, and larger than that",
            where="--shard-size",
            expected=f"at least {largest} B",
            found=f"{limit} B",
        )


def _bytes(items: Sequence[Item], layer: int) -> int:
    return sum(one.nbytes for item in items if item.tensor.layer == layer for one in item.planned)


def _settings(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration,
    options: Options,
    method: str,
) -> dict[str, Any]:
    """What decides the bytes of the result, as JSON."""
    device = options.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    settings = {
        "qmix version": qmix.__version__,
        "torch version": torch.__version__.split("+")[0],
        "device": name,
        "number of threads": torch.get_num_threads() if device.type == "cpu" else None,
        "method": method,
        "source": resume.digest(checkpoint),
        "recipe": [[pattern, str(scheme)] for pattern, scheme in recipe.rules],
        "calibration": {
            "text_sha256": calibration.text_sha256,
            "samples": calibration.ids.shape[0],
            "seqlen": calibration.ids.shape[1],
        },
        "rounding": asdict(options.layer.rounding),
        "weighting": options.layer.weighting,
        "correction": options.layer.correct,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


class _Work:
    """The files of one run: shards by layer, and the tokens between the layers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        items: Sequence[Item],
        recipe: Recipe,
        calibration: Calibration,
        options: Options,
    ) -> None:
        self.checkpoint, self.items, self.recipe = checkpoint, items, recipe
        self.ids, self.options = calibration.ids, options
        self.width = checkpoint.config.hidden_size
        self.layers = checkpoint.config.num_hidden_layers
        self.bytes_in = sum(checkpoint.entry(item.tensor.name).nbytes for item in items)
        self.streams = ("tokens", "exact") if options.layer.correct else ("tokens",)
        array_bytes = 4 * self.ids.numel() * self.width
        token_bytes = array_bytes * (2 * len(self.streams) + len(self.streams) - 1)
        self.in_memory = token_bytes <= options.activation_bytes
        held = token_bytes if self.in_memory else 0
        self.memory = budget.for_calibration(checkpoint.config, self.ids.numel(), held)
        self.bytes_out = sum(one.nbytes for item in items for one in item.planned)
        self.bytes_needed = self.bytes_out + token_bytes

    def finished(self, folder: Path, state: resume.State) -> list[list[TensorResult]]:
        """The results of the layers that are done.

        Raises:
            CheckpointError: `state` holds something else, or a layer's shard has gone.
        """
        names = [
            [item.tensor.name for item in self.items if item.tensor.layer == layer]
            for layer in range(self.layers)
        ]
        remedy = "Remove the interrupted run and start again."
        done: list[list[TensorResult]] | None = None
        with suppress(TypeError, KeyError):
            done = [[TensorResult.of(result) for result in layer] for layer in state.results]
        if done is None or [[one.name for one in layer] for layer in done] != names[: len(done)]:
            raise CheckpointError(
                "not the results of layers", where=str(folder / output_dir.STATE), remedy=remedy
            )
        for layer in range(len(done)):
            shard = folder / shard_name(layer + 1, self.layers + 2)
            if not shard.is_file():
                raise CheckpointError("missing", where=str(shard), remedy=remedy)
        return done

    def enter(self, folder: Path, done: int) -> dict[str, Activations]:
        """The tokens before layer `done`, by stream: rounded so far, and unrounded if corrected."""
        count = self.ids.numel()
        if done:
            return {
                stream: Activations.load(
                    folder / _tokens_name(stream, done), count, self.width, in_memory=self.in_memory
                )
                for stream in self.streams
            }
        table = self.checkpoint.read("model.embed_tokens.weight").float()
        tokens = {stream: self._array(folder / _tokens_name(stream, 0)) for stream in self.streams}
        flat = self.ids.view(-1)
        for start in range(0, count, _EMBEDDED_TOKENS):
            embedded = embedding(flat[start : start + _EMBEDDED_TOKENS], table)
            for array in tokens.values():
                array.write(start, embedded)
        return tokens

    def _array(self, path: Path) -> Activations:
        path.unlink(missing_ok=True)
        return Activations(self.ids.numel(), self.width, None if self.in_memory else path)

    def layer(
        self,
        folder: Path,
        layer: int,
        tokens: Mapping[str, Activations],
        progress: Callable[[Progress], None],
    ) -> tuple[list[TensorResult], dict[str, Activations]]:
        """Round one layer and put its shard, and the tokens after it, on the disk."""
        places = {stream: folder / _tokens_name(stream, layer + 1) for stream in self.streams}
        after = {
            stream: self._array(path.with_name(f"{path.name}.writing"))
            for stream, path in places.items()
        }
        streams = {name: Stream(tokens[name], after[name]) for name in self.streams}
        scratch = folder / "sum.writing"
        exact = (streams["exact"], self._array(scratch)) if "exact" in streams else None
        order = [item.tensor.name for item in self.items]
        sizes = [self.checkpoint.entry(name).nbytes for name in order]

        def at(name: str) -> None:
            done = sum(sizes[: order.index(name)])
            progress(Progress(done, self.bytes_in, f"layer {layer + 1} of {self.layers}"))

        rounded = LayerQuantizer(
            self.checkpoint,
            layer,
            streams["tokens"],
            exact,
            seqlen=self.ids.shape[1],
            recipe=self.recipe,
            options=self.options.layer,
            device=self.options.device,
            progress=at,
        ).run()
        mine = [item for item in self.items if item.tensor.layer == layer]
        results = self._write(folder, layer + 1, mine, iter(rounded))
        for stream, path in places.items():
            after[stream].save(path)
        scratch.unlink(missing_ok=True)
        return results, after

    def ends(self, folder: Path) -> tuple[list[TensorResult], list[TensorResult]]:
        """Write what lies before and behind the layers, and the index."""
        embedded, behind = (
            [item for item in self.items if self._shard(item.tensor) == index]
            for index in (0, self.layers + 1)
        )
        found = (
            self._write(folder, 0, embedded, self._kept(embedded)),
            self._write(folder, self.layers + 1, behind, self._kept(behind)),
        )
        weight_map = {
            one.name: shard_name(self._shard(item.tensor), self.layers + 2)
            for item in self.items
            for one in item.planned
        }
        shards.write_index(folder, weight_map, self.bytes_out)
        return found

    def tidy(self, folder: Path, done: int) -> None:
        """Remove all but the shards of `done` layers, and the tokens behind them for the next."""
        kept = {shard_name(index + 1, self.layers + 2) for index in range(done)}
        kept.add(output_dir.STATE)
        if done < self.layers:
            kept |= {_tokens_name(stream, done) for stream in self.streams}
        for path in folder.iterdir():
            if path.name not in kept and not path.name.startswith("."):
                path.unlink()

    def _shard(self, tensor: ModelTensor) -> int:
        if tensor.layer is not None:
            return tensor.layer + 1
        return 0 if tensor.kind == "embedding" else self.layers + 1

    def _kept(self, items: Sequence[Item]) -> Iterator[Rounded]:
        for item in items:
            data = streaming.read(self.checkpoint, item.tensor)
            yield Rounded(tensor=item.tensor, weight=Dense(data))

    def _write(
        self, folder: Path, index: int, items: Sequence[Item], rounded: Iterator[Rounded]
    ) -> list[TensorResult]:
        name = shard_name(index, self.layers + 2)
        partial = folder / f"{name}.writing"
        partial.unlink(missing_ok=True)
        results = []
        with ShardWriter(partial, [one for item in items for one in item.planned]) as writer:
            for item, one in zip(items, rounded, strict=True):
                assert one.tensor == item.tensor
                tensors = streaming.packed(one.weight, item)
                for tensor_name, tensor in tensors.items():
                    writer.write(tensor_name, tensor)
                results.append(self._result(item, one, tensors))
        partial.rename(folder / name)
        return results

    def _result(self, item: Item, one: Rounded, tensors: Mapping[str, Tensor]) -> TensorResult:
        squared_error = squared_norm = 0.0
        if one.solution is not None:
            source = self.checkpoint.read(item.tensor.name)
            squared_error, squared_norm = streaming.errors(source, one.weight)
        solution = one.solution
        return TensorResult(
            name=item.tensor.name,
            kind=item.tensor.kind,
            scheme=item.scheme,
            parameters=math.prod(item.tensor.shape),
            bytes_out=sum(tensor.nbytes for tensor in tensors.values()),
            squared_error=squared_error,
            squared_norm=squared_norm,
            seconds=one.seconds,
            tokens=one.tokens,
            output_error=solution.output_error if solution else None,
            damping=solution.damping if solution else None,
            raised=solution.raised if solution else 0,
            fallback=solution.fallback if solution else None,
        )


def _tokens_name(stream: str, done: int) -> str:
    """The file of a stream's tokens as `done` layers left them."""
    return f"{stream}-{done:05d}.f32"
