"""GPTQ of a whole checkpoint: layer by layer, with each finished layer safely on the disk.

Each layer is one shard. OUT.partial also holds the calibration tokens as the finished layers left
them, so a killed run continues where it stopped and ends with the same bytes. Shape letters:
T calibration tokens, D hidden width. Knows nothing of how a layer is rounded.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import qmix
from qmix.errors import InterruptedRunError, UsageError
from qmix.formats import Checkpoint
from qmix.formats.files import output_dir
from qmix.planning import budget, quantize_cost
from qmix.planning.plan import check_memory
from qmix.planning.process_memory import peak_resident_bytes
from qmix.processes.group import ALONE, Group
from qmix.quantize.adapter import check_adapter, facts_of
from qmix.quantize.calibrated import loss_gradients
from qmix.quantize.calibrated.activations import Activations
from qmix.quantize.calibrated.background import Background
from qmix.quantize.calibrated.follower import Start
from qmix.quantize.calibrated.layer_work import EXPECTED, HASH
from qmix.quantize.calibrated.loss_gradients import LossGradients
from qmix.quantize.calibrated.options import CalibratedOptions
from qmix.quantize.calibrated.repair import repair
from qmix.quantize.calibrated.resume import RunState, read_state
from qmix.quantize.calibrated.rounded_tensor import RoundedTensor
from qmix.quantize.calibrated.run_files import RunFiles
from qmix.quantize.calibrated.windows import Calibration
from qmix.quantize.output_checkpoint import OutputTensor, complete, plan_outputs
from qmix.quantize.report import Effort, QuantizeReport, TensorResult
from qmix.quantize.rounding import gptq_choice
from qmix.quantize.source import Source
from qmix.weights.scheme import Recipe
from qmix.work_meter import WorkMeter

# What the manifest states of a run's settings.
_STATED = ("calibration", "rounding", "weighting", "objective", "correction")


def quantize_calibrated(
    source: Source,
    out: Path,
    recipe: Recipe,
    calibration: Calibration,
    options: CalibratedOptions,
    *,
    method: str = "gptq",
    resumed: bool = False,
    force: bool = False,
    documents: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
    meter: WorkMeter | None = None,
    group: Group = ALONE,
) -> QuantizeReport:
    """Quantize a 16- or 32-bit checkpoint directory into a new one, by what its matrices see.

    Args:
        source: see `open_source`.
        out: a directory that appears complete or not at all.
        recipe: which tensor gets which scheme; router, norms, embedding and head stay as they are.
        method: the name that report and manifest state.
        resumed: continue the interrupted run at `out`.partial, if there is one.
        force: replace an existing checkpoint at `out`.
        documents: write a model card and a page with pictures too.
        interrupted: called after every layer; True ends the run there.
        meter: counts the work, by the kinds of layer_work.EXPECTED.
        group: this process leads; the others call `follower.follow_quantize`.

    Raises:
        UsageError: an unsuitable path, or an interrupted run of other settings or another source.
        CheckpointError: a source that is damaged, holds NaN or changes; a run beyond repair.
        UnsupportedError: the source is quantized already, or a scheme does not fit a weight.
        ResourceError: too little disk space or memory.
        InterruptedRunError: `interrupted` returned True.
    """
    begun, meter = time.perf_counter(), meter or WorkMeter(EXPECTED)
    output_dir.check_paths(source.shards.directory, out, force=force)
    files = prepare(source, out, recipe, calibration, options, group)
    settings = _settings(recipe, calibration, options, method) | facts_of(source)
    with output_dir.partial(out, force=force, resume=resumed) as folder:
        _hash_source(source, files, meter)
        state = read_state(folder, settings, source)
        done = files.finished(folder, state)
        _go_on(files, folder, state, meter, Start(folder, recipe, calibration))
        count, seconds = _quantize_layers(files, folder, state, done, interrupted, meter)
        with meter.doing("checksums", HASH, files.bytes_out):
            first, last = files.write_ends(folder)
            files.check_shards(folder)
        report = QuantizeReport(
            method=method,
            tensors=(*first, *(result for results in done for result in results), *last),
            bytes_in=files.bytes_in,
            seconds=time.perf_counter() - begun,
            effort=_effort(source, calibration, options, count, seconds) if count else None,
        )
        complete(folder, source, files.outputs, report, _stated(settings), documents=documents)
        source.check_unchanged()
        check_adapter(source)
    return report


def _stated(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in _STATED}


def prepare(
    source: Source,
    out: Path,
    recipe: Recipe,
    calibration: Calibration,
    options: CalibratedOptions,
    group: Group = ALONE,
) -> RunFiles:
    """Plan the files of a run and check that they fit, before any tensor is read.

    Raises:
        UnsupportedError: the source is quantized already, or a scheme does not fit a weight.
        UsageError: a layer is larger than an output file may be.
        ResourceError: too little disk space or memory.
    """
    outputs = plan_outputs(source, recipe, requantize=options.requantize)
    _check_layer_sizes(source, outputs, options.shard_bytes)
    files = RunFiles(source, outputs, recipe, calibration, options, group)
    output_dir.check_space(out, files.bytes_out + files.token_bytes + files.gradient_bytes)
    if options.device.type == "cpu":
        in_memory = files.token_bytes if files.in_memory else 0
        by_loss = options.layer.objective == "loss"
        tokens = files.ids.numel()
        each = budget.for_calibration(source.config, tokens, in_memory, by_loss=by_loss)
        check_memory(each.times(group.size))
        if by_loss:
            states = loss_gradients.scratch_bytes(source, files.ids)
            states = states if states <= options.activation_bytes and group.size == 1 else 0
            check_memory(budget.for_backward(source.config, states).times(group.size))
    return files


def _hash_source(source: Source, files: RunFiles, meter: WorkMeter) -> None:
    """Plan the run; hash what has not been read yet, so that a later change is noticed."""
    unread = source.unread_bytes()
    meter.plan(files.work(range(files.layers)) | {HASH: unread + files.bytes_out})
    with meter.doing("checksums of the source", HASH, unread) as tell:
        source.hash_unread(lambda done, total: tell(done / total))


def _go_on(files: RunFiles, folder: Path, state: RunState, meter: WorkMeter, start: Start) -> None:
    """Tell the others; check what an earlier run left, and end its backward pass."""
    files.group.told(start)
    meter.drop(files.work(range(len(state.results))))
    repair(files, folder, state, meter)
    if files.options.layer.objective != "loss" or state.results:
        return

    def keep(digests: Mapping[str, str]) -> None:
        RunState(state.settings, state.source, (), dict(digests)).write(folder)

    LossGradients(
        files.checkpoint, files.ids, files.options, folder, files.digests, keep, meter, files.group
    ).run()


def _quantize_layers(
    files: RunFiles,
    folder: Path,
    state: RunState,
    done: list[list[TensorResult]],
    interrupted: Callable[[], bool],
    meter: WorkMeter,
) -> tuple[int, float]:
    """Quantize the layers that are not done yet, and append their results to `done`.

    Returns:
        How many there were, and the seconds that they took.
    """
    before, begun = len(done), time.perf_counter()
    files.remove_others(folder, len(done))
    tokens = files.enter(folder, len(done)) if len(done) < files.layers else {}
    with Background(files.in_memory) as background:
        for layer in range(len(done), files.layers):
            rounded, tokens = files.quantize_layer(folder, layer, tokens, meter)
            background.run(partial(_keep, files, folder, state, done, rounded, tokens))
            if interrupted() and layer + 1 < files.layers:
                background.wait()
                files.group.told()
                raise InterruptedRunError(
                    f"interrupted after layer {layer + 1} of {files.layers}, which is kept",
                    where=str(folder),
                    remedy="Run the same command with --resume to continue.",
                )
        background.wait()
    files.remove_others(folder, files.layers)
    files.group.told()  # that nothing is left to do
    return len(done) - before, time.perf_counter() - begun


def _keep(
    files: RunFiles,
    folder: Path,
    state: RunState,
    done: list[list[TensorResult]],
    rounded: Sequence[RoundedTensor],
    tokens: Mapping[str, Activations],
) -> None:
    """Put a layer and what a resumed run needs after it on the disk, the state last.

    Args:
        done: the results of the layers before it, to which the layer's own are appended.
    """
    layer = len(done)
    done.append(files.write_layer(folder, layer, rounded))
    if layer + 1 < files.layers:
        files.save_tokens(folder, layer, tokens)
    stored = [[asdict(result) for result in results] for results in done]
    RunState(state.settings, state.source, stored, files.needed(layer + 1)).write(folder)
    files.remove_tokens(folder, layer + 1)


def _effort(
    checkpoint: Checkpoint,
    calibration: Calibration,
    options: CalibratedOptions,
    layers: int,
    seconds: float,
) -> Effort:
    work = quantize_cost.work(
        checkpoint.config,
        calibration.ids.numel(),
        correct=options.layer.correct,
        refine=options.layer.rounding.refine,
        by_loss=options.layer.objective == "loss",
    )
    return Effort(
        layers=layers,
        layer_seconds=seconds,
        layer_flops=work.flops,
        peak_bytes=work.peak_bytes,
        resident_bytes=peak_resident_bytes(),
        gpu_seconds=work.gpu_seconds(32),
    )


def _check_layer_sizes(checkpoint: Checkpoint, outputs: Sequence[OutputTensor], limit: int) -> None:
    largest = max(
        sum(output.nbytes for output in outputs if output.tensor.layer == layer)
        for layer in range(checkpoint.config.num_hidden_layers)
    )
    if largest > limit:
        raise UsageError(
            "each layer is written to one file, and a layer is larger than this",
            where="--shard-size",
            expected=f"at least {largest} B",
            found=f"{limit} B",
        )


def _settings(
    recipe: Recipe,
    calibration: Calibration,
    options: CalibratedOptions,
    method: str,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result besides the source, as JSON."""
    device = options.device
    settings = {
        "qmix version": qmix.__version__,
        "torch version": torch.__version__.split("+")[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "kernels": gptq_choice.kernels_of(device),
        "forward passes": str(options.forward_dtype).removeprefix("torch."),
        "number of threads": torch.get_num_threads() if device.type == "cpu" else None,
        "method": method,
        "recipe": [[pattern, str(scheme)] for pattern, scheme in recipe.rules],
        "calibration": {
            "text_sha256": calibration.text_sha256,
            "samples": calibration.ids.shape[0],
            "seqlen": calibration.ids.shape[1],
        },
        "tokenization": hashlib.sha256(calibration.ids.numpy().data).hexdigest(),
        "rounding": asdict(options.layer.rounding),
        "weighting": options.layer.weighting,
        "objective": options.layer.objective,
        "correction": options.layer.correct,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
