"""Making a damaged file of an interrupted run again, from the source and the shards that are whole.

Tokens go through the finished layers once more: a layer whose shard is whole computes with the
weights in it, one whose shard is damaged is rounded again. What results must have the SHA-256 that
the state lists. Knows nothing of how a layer is rounded.
"""

from collections.abc import Sequence
from pathlib import Path

from qmix.formats.files.shards import read_entries, read_entry
from qmix.formats.layouts import gptq
from qmix.formats.layouts.gptq_config import ModuleSettings
from qmix.quantize.calibrated.loss_gradients import is_file_of_pass
from qmix.quantize.calibrated.resume import Damage, RunState, damaged_files
from qmix.quantize.calibrated.run_files import RunFiles
from qmix.quantize.output_checkpoint import OutputTensor
from qmix.weights.dense import Weight
from qmix.work_meter import WorkMeter


def repair(
    files: RunFiles,
    folder: Path,
    state: RunState,
    meter: WorkMeter,
) -> None:
    """Check every file that a resumed run builds on, and make the damaged ones again.

    Raises:
        CheckpointError: other bytes result, or a file of the backward pass is damaged.
    """
    files.digests |= state.files
    damage = list(damaged_files(folder, state.files))
    for found in damage:
        if is_file_of_pass(found.path.name):
            raise found.error()
    names = {found.path.name for found in damage}
    done = len(state.results)
    lost = [layer for layer in range(done) if files.layer_shard(layer) in names]
    last = done - 1 if any(name.endswith(".f32") for name in names) else max(lost, default=-1)
    tokens = files.enter(folder, 0) if damage else {}
    passed = files.work_of_a_layer.pass_only(files.ids.numel())
    meter.plan(files.work(lost))
    for _ in range(last + 1 - len(lost)):
        meter.plan(passed)
    for layer in range(last + 1):
        before = tokens
        if layer in lost:
            rounded, tokens = files.quantize_layer(folder, layer, tokens, meter)
            files.write_layer(folder, layer, rounded)
        else:
            outputs = files.layer_outputs(layer)
            weights = _rounded_weights(folder / files.layer_shard(layer), outputs)
            tokens = files.pass_layer(folder, layer, tokens, weights, meter)
        files.save_tokens(folder, layer, tokens)
        for array in before.values():
            if array.path is not None:
                array.path.unlink()
    for found in damage:
        made = files.digests[found.path.name]
        if made != found.expected:
            raise Damage(found.path, found.expected, f"SHA-256 {made[:16]} made again").error()


def _rounded_weights(shard: Path, outputs: Sequence[OutputTensor]) -> dict[str, Weight]:
    """The rounded weights of a finished layer, by the names of the tensors in the source."""
    entries = read_entries(shard)
    weights: dict[str, Weight] = {}
    for output in outputs:
        scheme = output.scheme
        if scheme.kind != "dense":
            settings = ModuleSettings(
                version=1,
                symmetric=scheme.symmetric,
                bits=scheme.bits,
                group_size=scheme.group_size,
                rule=None,
                where=str(shard),
            )
            tensors = {
                spec.name: read_entry(spec.name, entries[spec.name]) for spec in output.planned
            }
            rows, columns = output.tensor.shape
            weights[output.tensor.name] = gptq.unpack(
                tensors, output.tensor.prefix, str(shard), (rows, columns), settings
            )
    return weights
