"""The eval's protocol, computed a second time in the plainest way."""

import hashlib
import math
import shutil

import pytest
import torch

from qmix.errors import CheckpointError, QualityError, UsageError
from qmix.evals.quality import evaluation
from qmix.evals.quality.texts import read_text
from qmix.evals.quality.windows import WINDOW, scoring_windows
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY, small_model


def evaluate(folder, path, **options):
    return evaluation.evaluate(folder, read_text(path), **options)


TEXT = "Return the item at the given index, or raise an error; see also list. " * 40


@pytest.fixture
def folder(tmp_path):
    """An untrained model with the tiny model's tokenizer, 64 positions."""
    vocabulary = len(LlamaTokenizer.from_pretrained(TINY))
    out = tmp_path / "model"
    small_model(vocab_size=vocabulary, max_position_embeddings=64).save_pretrained(out)
    shutil.copy(TINY / "tokenizer.model", out)
    return out


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def losses(folder, ids):
    """Every target's loss, by the runtime model on one window."""
    from qmix.models.causal_lm import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def test_convention_a_is_non_overlapping_windows_one_bos_and_no_tail(folder, text):
    ids = LlamaTokenizer.from_pretrained(folder).encode(TEXT)
    windows = [ids[i : i + 64] for i in range(0, len(ids) - 63, 64)]
    by_hand = torch.cat([losses(folder, window) for window in windows]).double()
    result = evaluate(folder, text)
    assert ids[0] == 1
    assert 1 not in ids[1:]
    assert result.tokens == 63 * len(windows)
    assert result.perplexity == pytest.approx(math.exp(by_hand.mean()), rel=1e-5)
    spread = math.exp(by_hand.mean()) * float(by_hand.std()) / math.sqrt(len(by_hand))
    assert result.stderr == pytest.approx(spread, rel=1e-4)
    assert f"{len(windows)} windows of 64, non-overlapping" in result.protocol
    assert f"tail of {len(ids) % 64} tokens dropped" in result.protocol
    assert result.text_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


def test_a_stride_scores_every_token_once_with_more_context(folder, text):
    ids = LlamaTokenizer.from_pretrained(folder).encode(TEXT)
    starts = range(0, len(ids) - 63, 16)
    parts = [losses(folder, ids[s : s + 64])[0 if s == 0 else 47 :] for s in starts]
    by_hand = torch.cat(parts).double()
    result = evaluate(folder, text, stride=16)
    assert result.tokens == len(by_hand) == 63 + 16 * (len(starts) - 1)
    assert result.perplexity == pytest.approx(math.exp(by_hand.mean()), rel=1e-5)
    assert "stride 16" in result.protocol


def test_a_text_shorter_than_a_window_is_scored_as_one_and_says_so(folder, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Return it.", encoding="utf-8")
    ids = LlamaTokenizer.from_pretrained(folder).encode("Return it.")
    result = evaluate(folder, path)
    assert result.tokens == len(ids) - 1
    assert result.perplexity == pytest.approx(math.exp(losses(folder, ids).mean()), rel=1e-5)
    assert f"one window of {len(ids)}" in result.protocol


def test_the_default_window_is_2048_or_the_models_positions(folder, text):
    assert "windows of 64" in evaluate(folder, text).protocol
    assert "windows of 32" in evaluate(folder, text, window=32).protocol
    assert WINDOW == 2048


def test_a_model_compared_with_itself_diverges_by_nothing(folder, text):
    other = evaluate(folder, text, reference=folder).reference
    assert other.kl_mean == other.kl_median == other.kl_p99 == 0
    assert other.top1_agreement == 1


def test_divergence_is_kl_of_reference_from_model_per_token(folder, text, tmp_path):
    from qmix.models.causal_lm import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        model.lm_head.weight += 0.05 * torch.randn(
            model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    model.save_pretrained(tmp_path / "other")
    shutil.copy(folder / "tokenizer.model", tmp_path / "other")
    result = evaluate(tmp_path / "other", text, reference=folder)
    ids = LlamaTokenizer.from_pretrained(folder).encode(TEXT)
    rows = torch.tensor([ids[i : i + 64] for i in range(0, len(ids) - 63, 64)])
    base = MixtralForCausalLM.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        p = base(input_ids=rows).logits[:, :-1].log_softmax(-1).double()
        q = model(input_ids=rows).logits[:, :-1].log_softmax(-1).double()
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    other = result.reference
    assert other.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert other.kl_median == pytest.approx(float(kl.median()), rel=1e-3)
    assert other.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=0.05)
    assert other.top1_agreement == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).double().mean())
    )
    assert other.perplexity == pytest.approx(evaluate(folder, text).perplexity, rel=1e-6)


def test_a_text_from_windows_scores_as_the_same_text(folder, tmp_path):
    unix, windows = tmp_path / "unix", tmp_path / "windows"
    unix.write_bytes(b"Return\nit\n")
    windows.write_bytes(b"\xef\xbb\xbfReturn\r\nit\r\n")
    assert evaluate(folder, unix) == evaluate(folder, windows)


@pytest.mark.parametrize(
    ("data", "named"),
    [(b"", "empty"), (b"abc\xff\xfe", "offset 3"), (None, "no such file")],
)
def test_unfit_texts_are_refused(folder, tmp_path, data, named):
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=named):
        evaluate(folder, path)


@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 65}, {"stride": 0}, {"stride": 65}, {"dtype": "int8"}]
)
def test_options_out_of_range_are_refused(folder, text, options):
    with pytest.raises(UsageError):
        evaluate(folder, text, **options)


def test_two_tokenizers_cannot_be_compared(folder, text, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}'
    (other / "tokenizer_config.json").write_text(config)
    with pytest.raises(CheckpointError, match="tokenize the text differently"):
        evaluate(folder, text, reference=other)


def test_gates(folder, text):
    result = evaluate(folder, text, reference=folder)
    assert result.gate(max_perplexity=1e9, max_kl=1e-9) is None
    failure = result.gate(max_perplexity=1.0, max_kl=None)
    assert isinstance(failure, QualityError)
    assert "perplexity" in str(failure)


def test_every_target_is_scored_once_whatever_the_cut():
    for length in (2, 5, 9, 30, 31):
        for window in (2, 5, 9):
            for stride in range(1, window + 1):
                windows = scoring_windows(list(range(length)), window, stride)
                scored = []
                for index, row in enumerate(windows.ids.tolist()):
                    scored += [i for i, on in zip(row, windows.scored[index], strict=True) if on]
                assert len(scored) == len(set(scored))
                if stride < window:
                    assert scored == list(range(1, len(scored) + 1))


def test_the_protocol_separates_its_clauses_by_commas():
    words = scoring_windows(list(range(40)), 8, 8).protocol
    assert "non-overlapping, BOS" in words


def test_a_cache_in_8_bits_is_scored_at_every_position(folder, text, tmp_path):
    """The reference keeps 16 bits, so the divergence is the cache's alone."""
    plain, coded = (evaluate(folder, text, reference=folder, kv=kv) for kv in (None, "int8"))
    assert plain.reference.kl_mean == 0
    assert 0 < coded.reference.kl_mean < 0.05
    with pytest.raises(UsageError, match="'16' or 'int8'"):
        evaluate(folder, text, kv="fp8")
