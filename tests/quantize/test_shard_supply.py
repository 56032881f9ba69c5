"""In which order a source is read whose files come and go."""

import json

from safetensors.torch import load_file, save_file

from qmix.formats import open_checkpoint
from qmix.quantize.output_checkpoint import plan_outputs
from qmix.quantize.shard_supply import in_few_files, most_files
from qmix.weights.scheme import Recipe, Scheme

RECIPE = Recipe.uniform(Scheme(kind="nf4"), attention=True)


def visits(folder):
    checkpoint = open_checkpoint(folder)
    outputs = plan_outputs(checkpoint, RECIPE)
    found = in_few_files(checkpoint, outputs)
    opened = [name for visit in found for name in visit.opened]
    assert sorted(opened) == sorted(name for visit in found for name in visit.closed)
    assert len(opened) == len(set(opened))  # nothing is fetched twice
    return outputs, found


def test_files_that_follow_the_layers_leave_the_order_as_it_is(tiny):
    outputs, found = visits(tiny)
    assert [visit.output for visit in found] == outputs
    assert len(most_files(found)) <= 2


def test_files_in_another_order_are_read_one_after_the_other(tiny, tmp_path):
    tensors = {}
    for path in tiny.glob("*.safetensors"):
        tensors |= load_file(path)
    shards = [dict(sorted(tensors.items())[first::4]) for first in range(4)]
    for number, shard in enumerate(shards):
        save_file(shard, tmp_path / f"{number}.safetensors")
    weight_map = {name: f"{n}.safetensors" for n, shard in enumerate(shards) for name in shard}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    outputs, found = visits(tmp_path)
    names = [visit.output.tensor.name for visit in found]
    assert sorted(names) == sorted(output.tensor.name for output in outputs)
    assert len(most_files(found)) == 1
