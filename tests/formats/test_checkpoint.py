"""The loader is strict: the exact tensor set, or one line that names what differs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qmix
from qmix.errors import CheckpointError, QmixError
from qmix.formats import names
from qmix.formats.files import shard_names, shards
from qmix.models.causal_lm import MixtralForCausalLM
from tests.support.models import small_model
from tests.support.process import succeeds


@pytest.fixture
def folder(tmp_path):
    """A small dense checkpoint in one file, as save_pretrained of transformers writes it."""
    model = small_model()
    model.config.save_pretrained(tmp_path)
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors")


def load(folder):
    return MixtralForCausalLM.from_pretrained(folder, device="cpu")


W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def test_one_file_and_shards_load_alike(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "sharded")
    again = load(tmp_path / "sharded")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(W2), f"missing {W2}"),
        (lambda t: t.update({"model.extra.weight": torch.zeros(1)}), "left over model.extra.weight"),
        (lambda t: t.update({W2: t[W2].T.contiguous()}), "wrong shape; expected [64, 96]; found [96, 64]"),
        (lambda t: t.update({W2: t[W2].to(torch.int32)}), "wrong dtype"),
        (lambda t: t.pop("lm_head.weight"), "missing lm_head.weight"),
        (lambda t: t.update({f"{W2[:-7]}.qweight": torch.zeros(1)}), f"left over {W2}"),
        (lambda t: t.update({f"{W2[:-7]}.qweight": torch.zeros(1)}), f"missing {W2[:-7]}.scales"),
        (lambda t: t.update({f"{W2[:-7]}.weight_packed": torch.zeros(1)}), f"left over {W2}"),
        (lambda t: t.update({W2.replace("1.block", "3.block"): t[W2]}), "left over"),
        (lambda t: t.update({W2.replace("block_sparse_moe", "mlp").replace("w2", "down_proj"): t[W2]}), "two names"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_set_is_refused_by_name(folder, edit, named):
    change(folder, edit)
    with pytest.raises(QmixError, match="safetensors|" + str(folder)) as caught:
        load(folder)
    assert named in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 4}, {"num_hidden_layers": 2}, {"vocab_size": 130}, {"num_local_experts": 9},
     {"num_key_value_heads": 4}, {"intermediate_size": 128}],
)  # fmt: skip
def test_a_config_of_another_model_is_refused(folder, changes):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **changes}))
    with pytest.raises(CheckpointError):
        load(folder)


def test_other_spellings_of_the_names_load(folder):
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = load(folder)(input_ids=ids).logits

    def rename(tensors):
        for name in list(tensors):
            new = name.replace("block_sparse_moe", "mlp")
            for old, other in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                new = new.replace(f".{old}.", f".{other}.")
            tensors[new] = tensors.pop(name)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    change(folder, rename)
    with torch.no_grad():
        assert torch.equal(load(folder)(input_ids=ids).logits, before)


def test_canonical_names_are_fixed_points():
    config = small_model().config
    for tensor in names.model_tensors(config):
        assert names.canonical(tensor.name) == tensor.name


def test_dtype_and_device_are_honoured(folder):
    assert MixtralForCausalLM.from_pretrained(folder).dtype == torch.float32
    model = MixtralForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16
    assert MixtralForCausalLM.from_pretrained(folder, dtype="float16").dtype == torch.float16
    for bad in (
        {"dtype": "int8"},
        {"device": "abacus"},
        {"dtype": "float16", "torch_dtype": "float32"},
    ):
        with pytest.raises(QmixError):
            MixtralForCausalLM.from_pretrained(folder, **bad)


def test_weights_that_overflow_float16_are_refused(folder):
    change(folder, lambda t: t.update({W2: t[W2] * 1e6}))
    with pytest.raises(CheckpointError, match="not finite in float16"):
        MixtralForCausalLM.from_pretrained(folder, dtype="float16")


def test_nothing_outside_the_directory_is_opened_and_nothing_is_executed(folder):

    document = json.loads((folder / "config.json").read_text())
    document["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    code = f"""
import sys, torch, qmix.models.causal_lm
def load():
    qmix.models.causal_lm.MixtralForCausalLM.from_pretrained({str(folder)!r}, device="cpu")
load()  # torch imports some of itself lazily
seen = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str): seen.append(arguments[0])
    if event in ("exec", "compile", "subprocess.Popen", "socket.connect"): seen.append(event)
sys.addaudithook(hook)
load()
asked = ({str(folder)!r}, "/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup/")  # free memory
print([path for path in seen if not path.startswith(asked)])
"""
    assert succeeds(code).strip() == "[]"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_files_are_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=r"config|safetensors"):
        load(folder)


def test_load_needs_a_tokenizer_and_says_so(folder, tiny):
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        qmix.load(folder)
    shutil.copy(tiny / "tokenizer.model", folder)
    with pytest.raises(CheckpointError, match="the tokenizer has more tokens"):
        qmix.load(folder, device="cpu")
    small_model(vocab_size=2100).save_pretrained(folder / "wide")
    shutil.copy(tiny / "tokenizer.model", folder / "wide")
    model, tokenizer = qmix.load(folder / "wide", device="cpu")
    assert model.tokenizer is tokenizer
    assert model.generation_config.eos_ids == (2,)


def test_generation_config_json_names_the_ends_of_a_text(folder, tiny):
    small_model(vocab_size=2048, eos_token_id=2).save_pretrained(folder / "chat")
    shutil.copy(tiny / "tokenizer.model", folder / "chat")
    document = {"eos_token_id": [7, 9], "do_sample": True, "temperature": 0.1}
    (folder / "chat" / "generation_config.json").write_text(json.dumps(document))
    model, _ = qmix.load(folder / "chat", device="cpu")
    assert model.generation_config.eos_ids == (2, 7, 9)
    assert model.generation_config.sampling.temperature == 0.1
    (folder / "chat" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match="generation_config"):
        qmix.load(folder / "chat", device="cpu")


def test_a_v5_config_gives_the_same_logits(folder):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = load(folder)(input_ids=ids).logits
    document = json.loads((folder / "config.json").read_text())
    document["rope_parameters"] = {"rope_theta": document.pop("rope_theta"), "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(document))
    with torch.no_grad():
        assert torch.equal(load(folder)(input_ids=ids).logits, before)


def test_the_index_is_used_when_there_is_one(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    listing = dict.fromkeys(
        shards.read_entries(folder / "model-00001-of-00001.safetensors"),
        "model-00001-of-00001.safetensors",
    )
    (folder / shard_names.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listing}))
    assert load(folder).dtype == torch.float32
