"""The embedding of any weight: its rows, its dtype, its tie to the head, and where it cannot go."""

import pytest
import torch

from qmix.errors import UsageError
from qmix.nn.embedding import Embedding, check_ids, embedding
from qmix.nn.losses import next_token_loss
from qmix.weights.affine import Affine, pack_codes
from qmix.weights.scales import NestedScales
from qmix.weights.table import E2M1_VALUES, Table
from tests.support.models import small_model

WEIGHTS = ["int4", "int3", "e2m1"]


def affine(rows: int, columns: int, bits: int = 4) -> Affine:
    draw = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=draw)
    scales, biases = torch.randn(2, rows, columns // 32, generator=draw).bfloat16()
    return Affine(pack_codes(codes, bits), scales, bits=bits, biases=biases)


def table(rows: int, columns: int) -> Table:
    draw = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, generator=draw)
    exponents = torch.randint(120, 130, (rows, columns // 32), dtype=torch.uint8, generator=draw)
    powers = torch.exp2(torch.arange(256, dtype=torch.float64) - 127).float()
    scales = NestedScales(exponents, torch.ones(1), powers, block=exponents.numel())
    values = torch.tensor(E2M1_VALUES)
    shape = (rows, columns)
    return Table(codes, scales, values, shape, torch.bfloat16, 32, "e2m1", high_first=False)


@pytest.mark.parametrize("weight", [affine(50, 64), affine(50, 64, 3), table(50, 64)], ids=WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_whole_weight(weight, dtype):
    ids = torch.tensor([[3, 49, 0], [3, 3, 17]])
    module = Embedding(50, 64)
    module.store(weight, dtype)
    rows = module(ids)
    assert rows.dtype == module.dtype == dtype
    assert torch.equal(rows, weight.dequantize(dtype)[ids])
    assert torch.equal(rows, embedding(ids, weight, dtype))
    assert module.weight is None
    assert module.stored is weight


def test_a_change_of_dtype_changes_the_rows_and_not_the_scales():
    module, weight = Embedding(50, 64), affine(50, 64)
    module.store(weight, torch.bfloat16)
    module.to(torch.float32)
    assert module.dtype == torch.float32
    assert module.stored.scales.dtype == torch.bfloat16
    assert torch.equal(module(torch.arange(50)), weight.dequantize(torch.float32))


@pytest.mark.parametrize("ids", [[0, 128], [-1, 3]])
def test_an_id_outside_the_vocabulary_is_refused(ids):
    model = small_model()
    model.model.embed_tokens.store(affine(*model.model.embed_tokens.stored.shape))
    with pytest.raises(UsageError, match="token id outside the vocabulary"):
        model(torch.tensor([ids]))


def test_a_packed_embedding_fits_no_state_dict():
    module = Embedding(50, 64)
    module.store(affine(50, 64))
    with pytest.raises(UsageError, match="does not fit a state_dict"):
        module.state_dict()


def test_a_head_that_is_tied_to_a_packed_embedding_multiplies_it():
    model = small_model(tie_word_embeddings=True)
    vocabulary, hidden = model.config.vocab_size, model.config.hidden_size
    weight = affine(vocabulary, hidden)
    model.model.embed_tokens.store(weight, model.dtype)
    model.tie_weights()
    ids = torch.arange(7)[None]
    logits = model(ids).logits
    assert model.lm_head.stored is weight
    model.to(torch.float64).to(torch.float32)
    assert model.lm_head.stored is model.model.embed_tokens.stored
    dense = small_model(tie_word_embeddings=True)
    dense.model.embed_tokens.weight.data = weight.dequantize(torch.float32)
    largest = float(logits.detach().abs().max())
    torch.testing.assert_close(logits, dense(ids).logits, rtol=0, atol=1e-5 * largest)
    assert dense.get_input_embeddings()(ids).equal(model.get_input_embeddings()(ids))


class OnGpu(torch.Tensor):
    """Ids that say they lie on a GPU."""

    is_cuda = True


def test_ids_on_a_gpu_are_checked_before_they_are_looked_up(monkeypatch):
    """There a wrong id ends all work of the process."""
    model = small_model()
    wrong = torch.tensor([[3, 128]]).as_subclass(OnGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(UsageError, match=r"outside the vocabulary; expected 0 to 127; found 128"):
        model(wrong)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        model.generate(wrong, max_new_tokens=1)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        model.generate(wrong[:, 1:], max_new_tokens=1)  # one column: no prompt to look up
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_ids(wrong, 128)  # nothing may be looked at


def test_labels_on_a_gpu_are_checked_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    labels = torch.tensor([[0, 99]]).as_subclass(OnGpu)
    with pytest.raises(UsageError, match="no such label"):
        next_token_loss(torch.zeros(1, 2, 8), labels)
