"""Stacked experts of transformers 5 and MLX: byte ranges of each expert's matrix, and refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError
from qmix.formats import open_checkpoint
from qmix.formats.files.safetensors_header import TensorInfo
from qmix.formats.metadata import read_metadata
from qmix.formats.names import canonical
from qmix.formats.readers.storage import storage_summary
from qmix.formats.stacked import unstacked
from qmix.models.causal_lm import MixtralForCausalLM
from tests.support.models import small_model
from tests.support.promptness import within

CONFIG = MixtralConfig(
    hidden_size=4,
    intermediate_size=6,
    num_local_experts=3,
    num_attention_heads=1,
    num_key_value_heads=1,
)
BLOCK = "model.layers.0.mlp.experts"


def info(*shape, dtype="F32", item=4):
    nbytes = item * torch.Size(shape).numel()
    return TensorInfo(Path("m.safetensors"), dtype, shape, 1000, 1000 + nbytes)


def test_gate_and_up_of_transformers_are_the_halves_of_an_experts_rows():
    found = unstacked({f"{BLOCK}.gate_up_proj": info(3, 12, 4)}, CONFIG)
    assert list(found) == [
        f"{BLOCK}.gate_up_proj[{expert}].{part}" for expert in range(3) for part in ("gate", "up")
    ]
    starts = [1000 + 96 * half for half in range(6)]
    assert [part.start for part in found.values()] == starts
    assert [part.stop for part in found.values()] == [start + 96 for start in starts]
    assert {part.shape for part in found.values()} == {(6, 4)}
    assert [canonical(name) for name in found] == [
        f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"
        for expert in range(3)
        for name in ("w1", "w3")
    ]


def test_other_tensors_stay():
    infos = {f"{BLOCK}.0.gate_up_proj.weight": info(2), "model.norm.weight": info(4)}
    assert unstacked(infos, CONFIG) == infos


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gate_up_proj", (3, 4, 12)),  # as gpt-oss has it
        ("gate_up_proj", (4, 12, 4)),
        ("gate_up_proj", (3, 12)),
        ("gate_up_proj", (3, 12, 0)),
        ("down_proj", (3, 6, 4)),
        ("down_proj", (1 << 40, 4, 0)),
        ("down_proj", ()),
    ],
)
def test_another_shape_is_refused(name, shape):
    with within(0.1), pytest.raises(CheckpointError, match=rf"{name}: wrong shape; expected \[3, "):
        unstacked({f"{BLOCK}.{name}": info(*shape)}, CONFIG)


@pytest.mark.parametrize("shape", [(3, 6, 0), (1 << 40, 6, 0), (3, 4, 2), (3, 6), (3, 6, 2, 1)])
def test_a_stack_of_mlx_of_another_shape_is_refused(shape):
    name = "model.layers.0.block_sparse_moe.switch_mlp.up_proj.scales"
    with pytest.raises(CheckpointError, match="wrong shape"):
        unstacked({name: info(*shape)}, CONFIG)


def stack(folder):
    """Bring the experts of a folder into the names of transformers 5."""
    file = next(folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors, experts = load_file(file), {}
    for name in [name for name in tensors if ".experts." in name]:
        block, _, rest = name.partition(".block_sparse_moe.experts.")
        index, part, _ = rest.split(".")
        experts.setdefault(block, {})[int(index), part] = tensors.pop(name)
    for block, of in experts.items():
        count = 1 + max(index for index, _ in of)
        both = [torch.cat((of[e, "w1"], of[e, "w3"])) for e in range(count)]
        tensors[f"{block}.mlp.experts.gate_up_proj"] = torch.stack(both)
        tensors[f"{block}.mlp.experts.down_proj"] = torch.stack([of[e, "w2"] for e in range(count)])
    tensors = {name.replace("block_sparse_moe.", "mlp."): tensors[name] for name in tensors}
    save_file(tensors, file)


def test_a_checkpoint_of_stacked_experts_is_the_one_of_single_ones(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "m")
    before = open_checkpoint(tmp_path / "m")
    weights = [before.read(tensor.name) for tensor in before.tensors]
    stack(tmp_path / "m")
    after = open_checkpoint(tmp_path / "m")
    assert after.tensors == before.tensors
    for tensor, weight in zip(after.tensors, weights, strict=True):
        assert torch.equal(after.read(tensor.name), weight), tensor.name
    assert storage_summary(after.metadata).dialect == "stacked"


def test_both_spellings_of_one_expert_are_refused(tmp_path):
    small_model().save_pretrained(tmp_path / "m")
    file = next((tmp_path / "m").glob("*.safetensors"))
    tensors = load_file(file)
    stack(tmp_path / "m")
    save_file(tensors | load_file(file), file)
    with pytest.raises(CheckpointError, match="the same tensor under two names"):
        read_metadata(tmp_path / "m")


def test_transformers_5_reads_and_writes_the_same_stacks(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        vocab_size=40,
    )
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "m", save_original_format=False)
    assert f"{BLOCK}.gate_up_proj" in load_file(tmp_path / "m" / "model.safetensors")
    ours = MixtralForCausalLM.from_pretrained(tmp_path / "m", device="cpu")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
