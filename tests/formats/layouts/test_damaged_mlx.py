"""MLX's checkpoints that are damaged, or whose settings contradict the tensors: one error each."""

import json
import random
import shutil

import pytest
import torch

from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats import open_checkpoint
from tests.support.golden import copied_mlx, edit_tensors
from tests.support.mutation import mutated_document, outcome
from tests.support.promptness import within

LAYER = "model.layers.0"
STACK = f"{LAYER}.block_sparse_moe.switch_mlp.up_proj"


def with_settings(folder, changes):
    document = json.loads((folder / "config.json").read_text())
    document.pop("quantization_config", None)
    document["quantization"] |= changes
    (folder / "config.json").write_text(json.dumps(document))


def missing(part):
    return lambda tensors: tensors.pop(f"{STACK}.{part}")


def replaced(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name]).contiguous()

    return edit


def nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


DAMAGE = {
    "no scales": (missing("scales"), "experts.0.w3.scales"),
    "no biases": (missing("biases"), "experts.0.w3.biases"),
    "no codes": (missing("weight"), "experts.0.w3.weight"),
    "an expert short": (replaced(f"{STACK}.scales", lambda t: t[:1]), "wrong shape"),
    "not stacked": (replaced(f"{STACK}.scales", lambda t: t[0]), "wrong shape"),
    "no expert has bytes": (replaced(f"{STACK}.scales", lambda t: t[..., :0]), "wrong shape"),
    "too many words": (
        replaced(f"{STACK}.weight", lambda t: torch.cat((t, t[..., :3]), -1)),
        "wrong shape",
    ),
    "one bit": (replaced("lm_head.weight", lambda t: t[:, :2]), "1 bit"),
    "a row short": (replaced("lm_head.weight", lambda t: t[:-1]), "wrong shape"),
    "signed words": (replaced("lm_head.weight", lambda t: t.view(torch.int32)), "wrong dtype"),
    "bytes": (replaced("lm_head.weight", lambda t: t.view(torch.uint8)), "wrong shape"),
    "NaN scale": (replaced("lm_head.scales", nan), "holds NaN or infinity"),
    "NaN bias": (replaced(f"{STACK}.biases", nan), "holds NaN or infinity"),
    "biases of another dtype": (replaced("lm_head.biases", torch.Tensor.half), "wrong dtype"),
    "biases of another shape": (
        replaced("lm_head.biases", lambda t: t[:, :0]),
        "unknown group size",
    ),
    "groups of 16": (
        lambda tensors: tensors.update(
            {
                f"lm_head.{part}": tensors[f"lm_head.{part}"].repeat(1, 4)
                for part in ("scales", "biases")
            }
        ),
        "group",
    ),
    "a scale of an expert": (
        lambda tensors: tensors.update({f"{STACK}.global_scale": torch.ones(2)}),
        "left over",
    ),
    "quantized norm": (
        lambda tensors: tensors.update({"model.norm.scales": torch.ones(1)}),
        "left over model.norm.scales",
    ),
    "both kinds of experts": (
        lambda tensors: tensors.update(
            {f"{LAYER}.block_sparse_moe.experts.0.w3.scales": torch.ones(64, 1)}
        ),
        "under two names",
    ),
}


def load(folder):
    checkpoint = open_checkpoint(folder)
    for tensor in checkpoint.tensors:
        if checkpoint.packed(tensor):
            checkpoint.weight(tensor)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(damage, tmp_path):
    edit, message = DAMAGE[damage]
    folder = copied_mlx("affine4", tmp_path / "m")
    edit_tensors(folder, edit)
    with pytest.raises(QmixError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


FP4_DAMAGE = {
    "biases": (
        "mxfp4",
        lambda t: t.update({"lm_head.biases": torch.ones(40, 2)}),
        "no 4-bit floats",
    ),
    "another block": (
        "mxfp4",
        replaced("lm_head.scales", lambda t: t[:, :1]),
        "wrong shape|mode",
    ),
    "NaN": ("mxfp4", lambda t: t["lm_head.scales"].fill_(255), "holds NaN"),
    "NaN in E4M3": ("nvfp4", lambda t: t["lm_head.scales"].fill_(127), "holds NaN"),
    "no expert's scale": (
        "nvfp4-experts",
        lambda t: t[f"{STACK}.global_scale"].fill_(0),
        "a finite number above 0",
    ),
    "an expert's scale too many": (
        "mxfp4",
        lambda t: t.update({f"{STACK}.global_scale": torch.ones(2)}),
        "left over",
    ),
}


@pytest.mark.parametrize("damage", FP4_DAMAGE)
def test_damage_of_4_bit_floats_is_refused_by_name(damage, tmp_path):
    name, edit, message = FP4_DAMAGE[damage]
    folder = copied_mlx(name, tmp_path / "m")
    edit_tensors(folder, edit)
    with pytest.raises(QmixError, match=message):
        load(folder)


GATE = f"{LAYER}.block_sparse_moe.switch_mlp.gate_proj"
CONTRADICTIONS = {
    "bits": ({"bits": 8}, "bits"),
    "group": ({"group_size": 32}, "group_size"),
    "mode": ({"mode": "mxfp4"}, "mode"),
    "rule": ({GATE: {"group_size": 64, "bits": 2}}, "bits"),
    "dense": ({"lm_head": False}, "lm_head"),
    "dense stack": ({GATE: False}, "switch_mlp.gate_proj"),
    "type": ({"bits": "4"}, "bits"),
    "unknown group": ({"group_size": 63}, "group_size"),
    "unknown mode": ({"mode": "q4"}, "mode"),
    "method": ({"quant_method": "awq"}, "quant_method"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_settings_that_the_tensors_contradict_are_refused(case, tmp_path):
    changes, field = CONTRADICTIONS[case]
    folder = copied_mlx("affine4", tmp_path / "m")
    with_settings(folder, changes)
    with pytest.raises(CheckpointError, match=field):
        open_checkpoint(folder)


def test_eight_bit_floats_are_refused_by_their_mode(tmp_path):
    folder = copied_mlx("affine4", tmp_path / "m")
    with_settings(folder, {"mode": "mxfp8", "bits": 8, "group_size": 32})
    with pytest.raises(UnsupportedError, match="8-bit floats"):
        open_checkpoint(folder)


def test_two_settings_that_differ_are_refused(tmp_path):
    folder = copied_mlx("affine4", tmp_path / "m")
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"]["bits"] = 8
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="contradicts quantization_config"):
        open_checkpoint(folder)


def test_rules_of_single_modules_are_confirmed_by_either_name(tmp_path):
    folder = copied_mlx("affine4", tmp_path / "m")
    own = {"group_size": 64, "bits": 4}
    classic = f"{LAYER}.block_sparse_moe.experts.1.w2"
    with_settings(folder, {"bits": 4, GATE: own, classic: own, "lm_head": own | {"mode": "affine"}})
    load(folder)


def test_without_settings_the_tensors_say_it_all(tmp_path):
    folder = copied_mlx("nvfp4", tmp_path / "m")
    document = json.loads((folder / "config.json").read_text())
    del document["quantization"], document["quantization_config"]
    (folder / "config.json").write_text(json.dumps(document))
    load(folder)


@pytest.mark.parametrize("name", ["mixed", "nvfp4-experts"])
def test_mutated_files_give_one_error_of_ours_in_a_second(name, tmp_path):
    """100 mutations of the config, the header or the tensors of each."""
    rng, refused = random.Random(name), 0
    for number in range(100):
        folder = copied_mlx(name, tmp_path / str(number))
        config, file = folder / "config.json", folder / "model.safetensors"
        if number % 3 == 0:
            config.write_text(json.dumps(mutated_document(json.loads(config.read_text()), rng)))
        elif number % 3 == 1:
            data = bytearray(file.read_bytes())
            length = int.from_bytes(data[:8], "little")
            for _ in range(rng.randint(1, 4)):
                data[8 + rng.randrange(length)] = rng.choice(b'0123456789[]{},:"aFU')
            file.write_bytes(data)
        else:
            edit_tensors(folder, lambda tensors: mutate_tensors(tensors, rng))
        with within(1):
            refused += outcome(lambda folder=folder: load(folder)) == "refused"
        shutil.rmtree(folder)
    assert refused > 60


def mutate_tensors(tensors, rng):
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    action = rng.choice(("remove", "rename", "cut", "flatten", "repeat", "dtype", "empty"))
    if action in ("remove", "rename"):
        value = tensors.pop(name)
        if action == "rename":
            tensors[rng.choice(("x", f"{name}.x", name.replace("s", "z", 1)))] = value
    elif action == "cut":
        axis = rng.randrange(tensor.dim())
        tensors[name] = tensor.narrow(axis, 0, tensor.shape[axis] - 1).contiguous()
    elif action == "flatten":
        tensors[name] = tensor.reshape(-1)
    elif action == "repeat":
        tensors[name] = torch.cat((tensor, tensor))
    elif action == "dtype":
        tensors[name] = tensor.view(torch.uint8)
    else:
        tensors[name] = torch.empty((0, *tensor.shape[1:]), dtype=tensor.dtype)
