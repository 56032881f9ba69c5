"""A model with each backend: the same text, and the commands that take one."""

import pytest
import torch

import qmix
from qmix.errors import CUT_REPLY, UnsupportedError
from qmix.generation.config import GenerationConfig
from qmix.kernels import bnb
from qmix.kernels.backend import VARIABLE
from qmix.kernels.cpu import matmul
from qmix.weights.scheme import Scheme
from tests.support.models import quantized, write_dense
from tests.support.oracles import needs_bitsandbytes
from tests.support.process import qmix as command

PROMPT = "the model reads a text and"


def loaded(folder, backend, **options):
    return qmix.load(folder, device="cpu", backend=backend, **options)


def greedy(model, tokenizer):
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    config = GenerationConfig(max_new_tokens=16, do_sample=False)
    with torch.no_grad():
        return model.generate(ids, config)[0].tolist(), model(ids).logits


@needs_bitsandbytes
def test_the_text_is_the_same_with_every_backend(tiny_nf4):
    text, logits = greedy(*loaded(tiny_nf4, "auto", dtype="float32"))
    for backend in ("bitsandbytes", "torch"):
        other, others = greedy(*loaded(tiny_nf4, backend, dtype="float32"))
        assert other == text
        assert (others - logits).abs().max() <= 2e-5 * logits.abs().max()


@needs_bitsandbytes
@pytest.mark.soak
def test_in_bfloat16_they_differ_by_roundings(tiny_nf4):
    """At most positions: where the router's choice is all but even, another expert may be taken."""
    _, exact = greedy(*loaded(tiny_nf4, "torch", dtype="float32"))
    for backend in ("auto", "bitsandbytes", "torch"):
        _, logits = greedy(*loaded(tiny_nf4, backend, dtype="bfloat16"))
        assert (logits - exact).abs().amax(-1).median() <= 1e-2 * exact.abs().max()


@needs_bitsandbytes
def test_every_quantized_matmul_is_the_packages(tiny_nf4, monkeypatch):
    model, tokenizer = loaded(tiny_nf4, "bitsandbytes")
    count = 0
    multiply = bnb.linear

    def counted(x, weight):
        nonlocal count
        count += 1
        return multiply(x, weight)

    monkeypatch.setattr(bnb, "linear", counted)
    monkeypatch.setattr(matmul, "linears", None)  # our own must not be asked
    ids = torch.tensor([tokenizer.encode(PROMPT)[:1]])
    with torch.no_grad():
        model(ids)
    config = model.config
    a_layer = 4 + 3 * config.num_experts_per_tok
    assert count == config.num_hidden_layers * a_layer


def test_torch_needs_no_compiled_kernels(tiny_nf4, monkeypatch):
    model, tokenizer = loaded(tiny_nf4, "torch")
    assert model.model.backend == "torch"
    for name in ("linears", "add_experts"):
        monkeypatch.setattr(matmul, name, None)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    assert len(model.generate(ids, max_new_tokens=3, do_sample=False)[0]) == ids.shape[1] + 3


@needs_bitsandbytes
def test_chat_takes_the_backend_of_the_environment(tiny_nf4, monkeypatch):
    arguments = ("chat", tiny_nf4, "--device", "cpu", "--temperature", 0, "--max-new-tokens", 8)
    ours = command(*arguments, "--backend", "qmix", stdin="Hello\n")
    multiplied = []
    multiply = bnb.linear
    monkeypatch.setattr(bnb, "linear", lambda x, w: multiplied.append(w) or multiply(x, w))
    monkeypatch.setenv(VARIABLE, "bitsandbytes")
    theirs = command(*arguments, stdin="Hello\n")
    assert (theirs.returncode, theirs.stdout) == (ours.returncode, ours.stdout)
    assert ours.returncode in (0, CUT_REPLY), ours.stderr
    assert multiplied


@pytest.mark.parametrize("name", ["generate", "chat", "eval", "bench", "trace"])
def test_every_command_that_loads_a_model_takes_a_backend(name):
    words = ("trace", "record") if name == "trace" else (name,)
    assert "--backend" in command(*words, "--help").stdout


def test_an_unknown_backend_is_a_wrong_usage(tiny_nf4, monkeypatch):
    done = command("generate", tiny_nf4, "x", "--backend", "cublas")
    assert done.returncode == 2
    assert (
        "--backend': 'cublas' is not one of 'auto', 'qmix', 'bitsandbytes', 'torch'" in done.stderr
    )
    monkeypatch.setenv(VARIABLE, "cublas")
    done = command("eval", tiny_nf4, "--data", tiny_nf4 / "config.json")
    assert done.returncode == 2
    assert "QMIX_BACKEND: no such backend" in done.stderr


def test_a_named_backend_that_cannot_multiply_the_weights_is_an_error(tmp_path):
    dense = write_dense(tmp_path / "dense", num_hidden_layers=1)
    folder = quantized(dense, tmp_path / "int4", Scheme(kind="int4", group_size=32), method="rtn")
    with pytest.raises(UnsupportedError, match=r"expected NF4 or FP4; found int4"):
        loaded(folder, "bitsandbytes")


def test_eval_takes_a_backend(tiny_nf4, tmp_path):
    text = tmp_path / "text"
    text.write_text("the model reads a text and writes another one " * 4)
    for backend in ("torch", "qmix"):
        done = command(
            *("eval", tiny_nf4, "--data", text, "--ctx", 32, "--device", "cpu"),
            *("--backend", backend, "--json"),
        )
        assert done.returncode == 0, done.stderr
