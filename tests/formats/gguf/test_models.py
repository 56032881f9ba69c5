"""GGUF files as checkpoints: the same model as Hugging Face's, whole, in shards and in a folder."""

import math
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.metadata import read_metadata
from qmix.gguf.tensor_types import BY_NAME
from qmix.models.causal_lm import MixtralForCausalLM
from tests.support.gguf_files import (
    GOLDEN,
    gguf_bytes,
    mixtral_metadata,
    mixtral_tensors,
    write_mixtral,
    write_shards,
)
from tests.support.models import ids, small_model, write_dense
from tests.support.promptness import within

Q4_K_M = GOLDEN / "gguf-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def model():
    """Its weights are exact in float16."""
    return small_model().half().float()


def logits(path, prompt=None):
    loaded = MixtralForCausalLM.from_pretrained(path, dtype="float32", device="cpu")
    with torch.no_grad():
        return loaded(ids(12) if prompt is None else prompt).logits


def expected(model):
    with torch.no_grad():
        return model(ids(12)).logits


@pytest.mark.parametrize("stacked", [True, False])
def test_the_model_is_the_same(tmp_path, model, stacked):
    path = write_mixtral(tmp_path / "m.gguf", model, stacked=stacked)
    assert torch.equal(logits(path), expected(model))
    assert torch.equal(logits(tmp_path), expected(model)), "the folder stands for its only file"


def test_config_and_special_ids(tmp_path, model):
    changes = {
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eot_token_id": 5,
        "llama.attention.sliding_window": 64,
    }
    config = read_metadata(write_mixtral(tmp_path / "m.gguf", model, changes=changes)).config
    same = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    same |= {"num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok"}
    same |= {"vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps"}
    for field in same:
        assert getattr(config, field) == getattr(model.config, field), field
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, (2, 5), 0)
    assert (config.sliding_window, config.dtype) == (64, "float16")
    assert not config.tie_word_embeddings


def test_a_tied_head_is_the_embedding(tmp_path):
    model = small_model(tie_word_embeddings=True).half().float()
    path = write_mixtral(tmp_path / "m.gguf", model)
    assert read_metadata(path).config.tie_word_embeddings
    assert torch.equal(logits(path), expected(model))


def test_shards_are_one_model(tmp_path, model):
    paths = write_shards(tmp_path, model, 3)
    for path in (*paths, tmp_path):
        assert torch.equal(logits(path), expected(model))


def test_shards_that_do_not_belong_together(tmp_path, model):
    first, second, third = write_shards(tmp_path, model, 3)
    moved = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match="a shard is missing"):
        read_metadata(first)
    second.write_bytes(third.read_bytes())
    with pytest.raises(CheckpointError, match=r"is in two files"):
        read_metadata(first)
    second.write_bytes(moved)
    shutil.copy(first, tmp_path / "m-00005-of-00003.gguf")
    with pytest.raises(CheckpointError, match="no shard has this number"):
        read_metadata(tmp_path / "m-00005-of-00003.gguf")
    with pytest.raises(CheckpointError, match="several GGUF models in one folder"):
        read_metadata(tmp_path)
    renamed = tmp_path / "alone.gguf"
    shutil.copy(first, renamed)
    with pytest.raises(CheckpointError, match=r"split\.count"):
        read_metadata(renamed)


def test_a_shard_may_be_a_link_and_hidden_files_are_none(tmp_path, model):
    folder, other = tmp_path / "model", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    first, second = write_shards(folder, model, 2)
    shutil.move(second, other / second.name)
    second.symlink_to(other / second.name)
    for name in ("._model.gguf", ".DS_Store"):
        (folder / name).write_bytes(b"\0")
    assert read_metadata(first).container == read_metadata(folder).container == "GGUF"


def test_safetensors_beside_a_gguf_file_are_the_model(tmp_path, model):
    folder = write_dense(tmp_path / "dense")
    write_mixtral(folder / "m.gguf", model)
    assert read_metadata(folder).container == "safetensors"
    assert read_metadata(folder / "m.gguf").container == "GGUF"


def divergence(reference, other):
    exact, changed = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((exact.exp() * (exact - changed)).sum(-1).max())


def test_logits_are_those_of_llama_cpp():
    """As it is run, llama.cpp rounds activations to 8 bits, which alone is 2e-4 here."""
    golden = load_file(GOLDEN / "gguf-0.19.0.safetensors")
    ours = logits(Q4_K_M, golden["prompt"][None])[0]
    assert divergence(golden["exact"], ours) < 1e-6
    assert divergence(golden["logits"], ours) < 2 * divergence(golden["logits"], golden["exact"])


def test_logits_are_those_of_the_dequantized_weights(tmp_path):
    checkpoint = open_checkpoint(Q4_K_M)
    packed = MixtralForCausalLM.from_pretrained(Q4_K_M, dtype="float32", device="cpu")
    dense = MixtralForCausalLM(checkpoint.config)
    state = dense.state_dict()
    for tensor in checkpoint.tensors:
        if tensor.kind == "norm":
            state[tensor.name] = checkpoint.read(tensor.name).float()
        else:
            state[tensor.name] = checkpoint.weight(tensor).dequantize(torch.float32)
    dense.load_state_dict(state)
    prompt = ids(12)
    with torch.no_grad():
        assert (packed(prompt).logits - dense(prompt).logits).abs().max() < 1e-5


REFUSED = {
    "general.architecture": ("mamba", "not a Mixtral"),
    "llama.expert_count": (0, "no experts"),
    "llama.rope.scaling.type": ("yarn", "does not compute"),
    "llama.rope.scaling.factor": (4.0, "does not compute"),
    "llama.rope.dimension_count": (4, "partly rotated"),
    "llama.attention.value_length": (4, "unequal"),
    "llama.attention.causal": (False, "does not compute"),
    "llama.expert_gating_func": (2, "does not compute"),
    "llama.logit_scale": (0.5, "does not compute"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_model_that_is_no_mixtral_is_refused_by_key(tmp_path, model, key):
    value, message = REFUSED[key]
    path = write_mixtral(tmp_path / "m.gguf", model, changes={key: value})
    with pytest.raises(UnsupportedError, match=message) as error:
        read_metadata(path)
    assert f"{path}: {key}" in str(error.value)


WRONG = {
    "llama.block_count": (None, 0, "8", 1 << 31, 2),
    "llama.embedding_length": (None, 0, 128, [64, 64]),
    "llama.feed_forward_length": (None, 64, 1.5),
    "llama.attention.head_count": (None, 0, 7, 16),
    "llama.attention.head_count_kv": (0, 3, 8, [2, 2, 2]),
    "llama.attention.layer_norm_rms_epsilon": (None, -1.0, "x"),
    "llama.rope.freq_base": (0.0, "x"),
    "llama.expert_used_count": (None, 0, 9),
    "llama.expert_count": (4, 16, "8"),
    "llama.context_length": (None, 0),
    "llama.vocab_size": (64,),
    "tokenizer.ggml.tokens": (None, ["a"]),
    "tokenizer.ggml.eos_token_id": ("</s>",),
}


@pytest.mark.parametrize("key", WRONG)
def test_metadata_that_the_tensors_contradict(tmp_path, model, key):
    for value in WRONG[key]:
        path = write_mixtral(tmp_path / "m.gguf", model, changes={key: value})
        with pytest.raises(QmixError) as error:
            read_metadata(path)
        assert str(path) in str(error.value), value


def test_500_mutations_of_a_whole_model(tmp_path, model):
    """Each is read, or refused by one error that names the file, in under a second."""
    rng = random.Random(17)
    metadata, tensors = mixtral_metadata(model.config), mixtral_tensors(model)
    path = tmp_path / "m.gguf"
    keys = [key for key in metadata if "scores" not in key and "token_type" not in key]
    values = (0, 1, 2, 3, 7, 64, 96, 128, 1 << 31, -1, True, 0.0, 1.0, -1.0, float("nan"))
    values += ("", "llama", "A" * 300, [], [1], [1.5, 2.0], ["a"], None)
    names = list(tensors)
    shapes = ((1,), (64,), (64, 64), (128, 64), (2, 8, 64), (8, 96, 64), (1, 1, 1, 1))
    outcomes = {"read": 0, "refused": 0}
    for _ in range(500):
        changed, kept = dict(metadata), dict(tensors)
        for _ in range(rng.randint(1, 2)):
            action = rng.choice(("value", "value", "remove", "rename", "type", "shape"))
            name = rng.choice(names)
            if action == "value":
                changed[rng.choice(keys)] = rng.choice(values)
            elif action == "remove":
                kept.pop(name, None)
            elif name in kept and action == "rename":
                kept[rng.choice((*names, "blk.0.ffn_gate.0.weight", "x", "\x1b[0m"))] = kept.pop(
                    name
                )
            elif name in kept and action == "type":
                kind = rng.choice(list(BY_NAME.values()))
                rows = rng.choice((1, 64))
                raw = bytes(rows * kind.block_bytes)
                kept[name] = (kind.name, (rows, kind.block_size), raw)
            elif name in kept:
                shape = rng.choice(shapes)
                kept[name] = ("F16", shape, bytes(2 * math.prod(shape)))
        changed = {key: value for key, value in changed.items() if value is not None}
        path.write_bytes(gguf_bytes(changed, kept))
        with within(1):
            try:
                read_metadata(path)
                outcomes["read"] += 1
            except QmixError as error:
                outcomes["refused"] += str(path) in str(error) and "\x1b" not in str(error)
    assert sum(outcomes.values()) == 500, "an error that does not name the file"
    assert outcomes["refused"] > 250, outcomes
