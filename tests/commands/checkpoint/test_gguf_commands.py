"""The commands over checkpoint files take a GGUF file, or a folder with one."""

import pytest
import torch
from safetensors.torch import load_file

from qmix import LlamaTokenizer, MixtralForCausalLM
from qmix.commands.checkpoint.dequantize import dequantize_checkpoint
from qmix.commands.checkpoint.inspect import inspect
from qmix.commands.checkpoint.verify import verify
from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.metadata import read_metadata
from qmix.planning.stored_model import StoredModel
from qmix.quantize.source import open_source
from tests.support.gguf_files import GOLDEN, tokenizer_metadata, write_mixtral, write_shards
from tests.support.models import TINY, quantized, small_model
from tests.support.process import qmix

Q4_K_M = GOLDEN / "gguf-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def model():
    return small_model().half().float()


def test_inspect_names_types_and_readers(tmp_path, model):
    inventory = inspect(Q4_K_M)
    rows = {(group.kind, group.layout, group.scheme) for group in inventory.groups}
    assert ("expert", "GGUF", "Q4_K: int4 g32 asymmetric") in rows
    assert ("norm", "GGUF", "float32") in rows
    assert [(reader.reader, reader.outcome) for reader in inventory.readers] == [
        ("qmix", "loads"),
        ("llama.cpp (2026)", "loads"),
    ]
    single = inspect(write_mixtral(tmp_path / "m.gguf", model, stacked=False))
    assert single.readers[-1].outcome == "refuses"


def test_verify_reads_every_weight():
    result = verify(Q4_K_M)
    assert (result.problems, result.hashed) == ((), 0)
    assert result.weights == len(read_metadata(Q4_K_M).tensors)


def test_verify_finds_a_damaged_scale(tmp_path):
    path = tmp_path / "m.gguf"
    damaged = bytearray(Q4_K_M.read_bytes())
    metadata = read_metadata(Q4_K_M)
    stored = next(name for name in metadata.tensor_infos if "ffn_down_exps" in name)
    start = metadata.tensor_infos[stored].start
    damaged[start : start + 2] = b"\x00\x7e"
    if "Q6_K" in next(name for name, of in metadata.stored_names.items() if of == stored):
        damaged[start + 208 : start + 210] = b"\x00\x7e"
    path.write_bytes(damaged)
    (problem,) = verify(path).problems
    assert "NaN or infinite" in str(problem)
    assert "ffn_down_exps" in str(problem)


def test_planned_bytes_are_those_in_memory():
    checkpoint = open_checkpoint(Q4_K_M)
    stored = StoredModel.of(checkpoint.metadata)
    for tensor, planned in zip(checkpoint.tensors, stored.weights, strict=True):
        if checkpoint.packed(tensor):
            assert planned.memory_bytes(2) == checkpoint.weight(tensor).nbytes, tensor.name


def test_convert_writes_the_hubs_layout(tmp_path, model):
    """What is in 16 or 32 bits stays, row by row; what is in fewer is rounded once."""
    source = write_mixtral(tmp_path / "m.gguf", model)
    assert dequantize_checkpoint(source, tmp_path / "dense").weights == 0
    converted = open_checkpoint(tmp_path / "dense")
    state = model.state_dict()
    for tensor in converted.tensors:
        assert torch.equal(converted.read(tensor.name).float(), state[tensor.name]), tensor.name
    done = dequantize_checkpoint(Q4_K_M, tmp_path / "from-4-bits")
    assert (done.source, done.dtype) == ("GGUF", "bfloat16")
    (file,) = (tmp_path / "from-4-bits").glob("*.safetensors")
    packed = open_checkpoint(Q4_K_M)
    tensors = load_file(file)
    for tensor in packed.tensors:
        exact = packed.dense(tensor)
        assert torch.equal(tensors[tensor.name], exact.to(tensors[tensor.name].dtype))


def test_quantize_gives_what_it_gives_from_the_hubs_layout(tmp_path, model):
    shards = write_shards(tmp_path, model, 2)
    from_gguf = open_checkpoint(quantized(shards[0], tmp_path / "from-gguf"))
    model.half().save_pretrained(tmp_path / "dense")
    model.float()
    from_dense = open_checkpoint(quantized(tmp_path / "dense", tmp_path / "from-dense"))
    for name in from_dense.stored_names:
        assert torch.equal(from_gguf.read(name), from_dense.read(name)), name


def test_quantize_refuses_what_is_quantized(tmp_path):
    with pytest.raises(UnsupportedError, match="quantized already"):
        quantized(Q4_K_M, tmp_path / "out")


def test_a_source_that_changes_is_noticed(tmp_path, model):
    path = write_mixtral(tmp_path / "m.gguf", model)
    source = open_source(path)
    source.read("model.norm.weight")
    query = source.read("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(query.float(), model.state_dict()["model.layers.0.self_attn.q_proj.weight"])
    source.hash_unread()
    source.check_unchanged()
    raw = bytearray(path.read_bytes())
    raw[source.entry("model.norm.weight").start] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="changed while"):
        source.check_unchanged()


@pytest.mark.parametrize("command", ["plan", "inspect", "verify"])
def test_the_command_line_takes_the_file(command):
    options = ("--ram", "8GiB", "--vram", "4GiB") if command == "plan" else ()
    done = qmix(command, str(Q4_K_M), *options)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """The trained tiny model with its own tokenizer as one file."""
    model = MixtralForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_mixtral(path, model, changes=tokenizer_metadata())


def test_a_file_is_talked_to_as_it_is(tiny_file):
    options = ("--max-new-tokens", "8", "--temperature", "0", "--dtype", "float32")
    prompt = "This program is free"
    dense = qmix("generate", TINY, prompt, *options)
    assert dense.returncode == 0, dense.stderr
    assert qmix("generate", tiny_file, prompt, *options).stdout == dense.stdout
    assert qmix("generate", tiny_file.parent, prompt, *options).stdout == dense.stdout


def test_what_is_made_of_a_file_has_its_tokenizer(tmp_path, tiny_file):
    made = qmix("convert", tiny_file, tmp_path / "dense")
    assert made.returncode == 0, made.stderr
    text = "Zwei Wörter, 🙂\n\ttwo words"
    for folder in (tmp_path / "dense", tiny_file, TINY):
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        assert tokenizer.encode(text) == LlamaTokenizer.from_pretrained(TINY).encode(text)
    model = MixtralForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    again = MixtralForCausalLM.from_pretrained(tiny_file, dtype=torch.float32)
    ids = torch.tensor([[1, 300, 500, 7]])
    assert torch.equal(model(ids).logits, again(ids).logits)
