"""Synthetic checkpoints at true widths are for memory and speed; here they are made small."""

import pytest
import torch

import qmix
from qmix.config import MixtralConfig
from qmix.evals import synthetic
from qmix.formats import open_checkpoint
from qmix.weights.dense import Dense
from qmix.weights.table import Table


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """The same code on an eighth of the width."""
    original = synthetic.config

    def config(layers, *, packed, model):
        wide = original(layers, packed=packed)
        return MixtralConfig(**{
            **wide.to_dict(), "hidden_size": 512, "intermediate_size": 1792, "head_dim": 64,
            "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 3000,
        })  # fmt: skip

    monkeypatch.setattr(synthetic, "config", config)


def test_the_true_configuration_is_mixtrals():
    config = MixtralConfig(num_hidden_layers=3)
    true = synthetic.config.__closure__[0].cell_contents(3, packed=False)
    assert (true.hidden_size, true.intermediate_size) == (
        config.hidden_size,
        config.intermediate_size,
    )
    assert true.num_hidden_layers == 3
    large = synthetic.config.__closure__[0].cell_contents(2, packed=False, model="8x22B")
    assert (large.hidden_size, large.intermediate_size, large.head_dim) == (6144, 16384, 128)
    assert (large.num_attention_heads, large.num_key_value_heads) == (48, 8)


@pytest.mark.parametrize("packed", [False, True])
def test_it_loads_and_generates_finite_numbers(tmp_path, packed):
    synthetic.write_synthetic(tmp_path / "out", 2, packed=packed, seed=0)
    model, _ = qmix.load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 5, 9]])).logits
    assert torch.isfinite(logits).all()
    assert 0.01 < logits.std() < 100
    assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=4).shape == (1, 6)
    kinds = {type(m.stored) for m in model.model.layers[1].self_attn.children()}
    assert kinds == {Table if packed else Dense}


def test_a_seed_gives_the_same_weights_whatever_the_number_of_layers(tmp_path):
    synthetic.write_synthetic(tmp_path / "one", 1, packed=False, seed=7)
    synthetic.write_synthetic(tmp_path / "two", 2, packed=False, seed=7)
    synthetic.write_synthetic(tmp_path / "other", 1, packed=False, seed=8)
    name = "model.layers.0.block_sparse_moe.experts.4.w2.weight"
    one, two, other = (open_checkpoint(tmp_path / d).read(name) for d in ("one", "two", "other"))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_weights_have_outlier_channels(tmp_path):
    synthetic.write_synthetic(tmp_path / "out", 1, packed=False, seed=0)
    weight = open_checkpoint(tmp_path / "out").read(
        "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    )
    spread = weight.float().std(0)
    assert spread[::256].min() > 5 * spread[1:256].max()


def test_the_padded_tokenizer_has_the_vocabulary_and_encodes_as_before(tiny, tmp_path):
    import sentencepiece

    model = (tiny / "tokenizer.model").read_bytes()
    padded = sentencepiece.SentencePieceProcessor(
        model_proto=synthetic.padded_tokenizer(model, 32000)
    )
    assert padded.vocab_size() == 32000
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert padded.encode("Return a list, naïve ☃") == plain.encode("Return a list, naïve ☃")
    assert padded.decode([31999]) == "<unused31999>"


def test_an_existing_output_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    assert synthetic.main([str(tmp_path / "out"), "--layers", "1"]) == 2
