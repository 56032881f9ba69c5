"""The config alone decides a shape: odd widths, 4 and 16 experts, heads of any width."""

import pytest
import torch

from qmix.models.causal_lm import MixtralForCausalLM
from qmix.quantize.streaming import quantize_streaming
from qmix.weights.scheme import NF4, Recipe
from tests.support.models import ids, small_model

# 8x22B has 6144 and 16384, 48 heads of 128 and 8 of keys: ratios that 8x7B does not have.
SHAPES = {
    "8x22B, a 128th": {
        "hidden_size": 48, "intermediate_size": 128, "num_attention_heads": 12,
        "num_key_value_heads": 2, "num_local_experts": 8,
    },
    "4 experts": {
        "hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 5,
        "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 3,
    },
    "16 experts, wide heads": {
        "hidden_size": 56, "intermediate_size": 88, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 24, "num_local_experts": 16,
        "num_experts_per_tok": 4, "vocab_size": 331,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_is_saved_quantized_and_run(tmp_path, name):
    dense = small_model(num_hidden_layers=2, **SHAPES[name])
    dense.save_pretrained(tmp_path / "dense")
    prompt = ids(9)
    again = MixtralForCausalLM.from_pretrained(tmp_path / "dense", dtype="float32", device="cpu")
    with torch.no_grad():
        expected = dense(prompt).logits
        assert torch.equal(again(prompt).logits, expected)
        recipe = Recipe.uniform(NF4, attention=True)
        quantize_streaming(tmp_path / "dense", tmp_path / "nf4", recipe, method="nf4")
        packed = MixtralForCausalLM.from_pretrained(tmp_path / "nf4", dtype="float32", device="cpu")
        found = packed(prompt).logits
        assert 0 < (found - expected).norm() / expected.norm() < 0.5
        new = packed.generate(prompt, max_new_tokens=4, eos_token_id=-1, do_sample=False)
        whole = packed(new[:, :-1]).logits.argmax(-1)
    assert torch.equal(new[:, prompt.shape[1] :], whole[:, prompt.shape[1] - 1 :])


@pytest.mark.parametrize("name", SHAPES)
def test_its_logits_are_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    ours = small_model(num_hidden_layers=2, **SHAPES[name])
    ours.save_pretrained(tmp_path)
    theirs = transformers.MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        difference = (ours(ids(9)).logits - theirs(ids(9)).logits).abs().max()
    assert difference < 1e-5
