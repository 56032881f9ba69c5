"""Dense and 4-bit models as torch modules: gradients, copies, casts, saving, odd vocabularies."""

import copy
import shutil

import pytest
import torch

import qmix
from qmix.errors import CheckpointError
from qmix.models.causal_lm import MixtralForCausalLM
from tests.support.models import small_model

IDS = torch.tensor([[1, 5, 6, 7]])


def test_a_4_bit_model_can_be_called_without_no_grad(small_checkpoint_nf4):
    """With gradients recorded, values between the matmuls of an expert are rounded."""
    model, _ = qmix.load(small_checkpoint_nf4, device="cpu")
    with torch.no_grad():
        expected = model(IDS).logits
    found = model(IDS).logits
    assert found.requires_grad
    assert (found - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_the_loss_of_a_4_bit_model_has_a_gradient_by_its_dense_weights(small_checkpoint_nf4):
    model, _ = qmix.load(small_checkpoint_nf4, device="cpu", dtype="float32")
    model(IDS, labels=IDS).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert bool(gradient.abs().sum() > 0)


def test_a_dense_model_survives_a_copy_and_a_cast(model):
    again = copy.deepcopy(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.half().generate(IDS, max_new_tokens=2).shape == (1, 6)


def test_dense_and_4_bit_models_survive_save_and_load(small_checkpoint_nf4, tmp_path):
    model, _ = qmix.load(small_checkpoint_nf4, device="cpu")
    model.save_pretrained(tmp_path / "again")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "again", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_load(small_checkpoint, tmp_path):
    folder = tmp_path / "narrow"
    small_model(vocab_size=128, num_hidden_layers=1).save_pretrained(folder)
    shutil.copy(small_checkpoint / "tokenizer.model", folder)
    with pytest.raises(CheckpointError, match="2048"):
        qmix.load(folder, device="cpu")


def test_ids_beyond_the_tokenizer_do_not_break_a_reply(small_checkpoint, tmp_path):
    folder = tmp_path / "wide"
    model = small_model(vocab_size=4096, num_hidden_layers=1)  # padded, as for tensor cores
    model.save_pretrained(folder)
    shutil.copy(small_checkpoint / "tokenizer.model", folder)
    model, _ = qmix.load(folder, device="cpu")
    text = list(model.stream("hello", max_new_tokens=60, do_sample=True, seed=0, top_k=0))
    assert isinstance("".join(text), str)
