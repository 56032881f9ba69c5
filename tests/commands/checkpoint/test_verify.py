"""`verify` finds what an opened checkpoint does not show: wrong bytes and wrong numbers."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.commands.checkpoint.verify import verify
from qmix.errors import CheckpointError
from qmix.formats.files.manifest import MANIFEST, write_manifest
from tests.support import packers

W2 = "model.layers.1.block_sparse_moe.experts.3.w2"
CONFIG = {"bits": 4, "group_size": 32, "sym": True, "quant_method": "gptq"}


@pytest.fixture
def folder(tmp_path):
    packers.checkpoint(tmp_path, packers.gptq, CONFIG, act_order=True)
    return tmp_path


def change(folder, name, index, value):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[index] = value
    save_file(tensors, folder / "model.safetensors")


def test_a_sound_checkpoint(folder, tiny_nf4):
    result = verify(folder)
    assert result.problems == ()
    assert result.hashed == 0
    assert result.weights == len(load_file(folder / "model.safetensors")) - 3 * (2 * (4 + 12))
    seen = []
    result = verify(tiny_nf4, lambda *step: seen.append(step))
    assert result.problems == ()
    assert result.hashed >= 3
    assert [done for _, done, _ in seen] == list(range(seen[0][2]))


@pytest.mark.parametrize(
    ("name", "index", "value", "named"),
    [
        (f"{W2}.scales", 3, float("nan"), "scales: holds NaN"),
        (f"{W2}.scales", 3, float("inf"), "scales: holds NaN or infinity"),
        (f"{W2}.g_idx", 0, 99, "g_idx: group index out of range; expected 0 to 3; found 99"),
        (f"{W2}.qzeros", 0, 0, "qzeros: not the zeros of a symmetric weight"),
        ("model.norm.weight", 5, float("nan"), "model.norm.weight: holds NaN or infinity; expected finite values; found 1 other"),
        ("model.embed_tokens.weight", 7, float("-inf"), "model.embed_tokens.weight: holds NaN"),
        ("model.layers.0.block_sparse_moe.gate.weight", 7, float("inf"), "gate.weight: holds NaN"),
    ],
)  # fmt: skip
def test_a_wrong_number_is_named_with_its_file(folder, name, index, value, named):
    change(folder, name, index, value)
    (problem,) = verify(folder).problems
    assert named in str(problem)
    assert str(folder / "model.safetensors") in str(problem)
    assert problem.exit_code == 3


def test_the_first_five_problems_are_kept(folder):
    for expert in range(4):
        for layer in range(2):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.scales"
            change(folder, name, 0, torch.inf)
    assert len(verify(folder).problems) == 5


def test_a_flipped_bit_is_found_by_the_manifest(folder):
    write_manifest(folder, {"method": "gptq"})
    assert verify(folder).hashed == 2
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    (problem,) = verify(folder).problems
    assert "not the SHA-256" in str(problem)
    assert str(path) in str(problem)


def test_the_manifests_files_must_be_there_in_their_size(folder):
    (folder / "tokenizer.model").write_bytes(b"abc")
    write_manifest(folder, {})
    (folder / "tokenizer.model").write_bytes(b"abcd")
    assert "expected 3 B; found 4 B" in str(verify(folder).problems[0])
    (folder / "tokenizer.model").unlink()
    assert "missing" in str(verify(folder).problems[0])
    os.mkfifo(folder / "tokenizer.model")  # never opened
    assert "missing" in str(verify(folder).problems[0])


@pytest.mark.parametrize(
    "files",
    [None, [], {"../x": {"bytes": 1, "sha256": "0"}}, {"a/b": {"bytes": 1, "sha256": "0"}},
     {"/etc/passwd": {"bytes": 1, "sha256": "0"}}, {"x": 3}, {"x": {"bytes": 1}}, {"a\0": {}},
     *({name: {"bytes": 1, "sha256": "0"}} for name in ("", ".", "..", "a\0", "ß" * 128))],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(folder, files):
    (folder / MANIFEST).write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify(folder)


def test_what_cannot_be_opened_raises(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match=r"short|inside its header"):
        verify(folder)
