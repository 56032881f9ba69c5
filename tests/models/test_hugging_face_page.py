"""The code examples of the Hugging Face page, but for their imports, on three kinds of weights.

../shared/seed/mixtral_docs_v4.38.1.txt holds the examples themselves; where it lies beside the
checkout they are run to the letter. Otherwise the same calls, written here, stand for them.
"""

import re
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch

import qmix
from qmix import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
)
from qmix.errors import UnsupportedError
from qmix.kernels import flash
from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint
from tests.support.flash import flash_attn
from tests.support.models import SHARED, TINY

PAGE = SHARED / "seed" / "mixtral_docs_v4.38.1.txt"


@pytest.fixture(scope="module")
def tiny_gptq(tmp_path_factory):
    """The tiny Mixtral by GPTQ, on a little text."""
    out = tmp_path_factory.mktemp("gptq") / "tiny-gptq"
    request = QuantizeRequest(method="gptq", group_size=32, samples=4, seqlen=128, device="cpu")
    text = "".join(path.read_text() for path in sorted((TINY.parent.parent / "qmix").rglob("*.py")))
    quantize_checkpoint(TINY, out, request, text)
    return out


@pytest.fixture(params=["dense", "nf4", "gptq"])
def checkpoint(request):
    if request.param == "dense":
        return TINY
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def flash_stands_in(monkeypatch):
    """flash-attn's meaning without its GPU."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn())
    monkeypatch.setattr(flash, "check", lambda q: None)
    monkeypatch.setattr(flash, "check_installed", lambda: None)


def examples():
    """The page's code blocks: runs of `>>>` lines, and the plain one after a conversion."""
    blocks, lines = [], []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith(">>> "):
            lines.append(line.removeprefix(">>> "))
        elif line.startswith(("from transformers import", "tokenizer = ", "model = ")):
            lines.append(line)
        elif line.strip() and lines:
            blocks.append("\n".join(lines))
            lines = []
    return [block for block in blocks if "import" in block]


def test_the_pages_own_examples_run_to_the_letter(checkpoint, flash_stands_in):
    """Changed: the import line, the checkpoint's place, the device, and how long an answer gets."""
    if not PAGE.is_file():
        pytest.skip("no ../shared beside this checkout")
    found = examples()
    assert len(found) == 5
    for block in found:
        code = block.replace("from transformers import", "from qmix import")
        assert code.count("from qmix import") == 1
        code = re.sub(r'"(mistralai/[^"]*|/output/path)"', repr(str(checkpoint)), code)
        code = code.replace('"cuda"', '"cpu"').replace("max_new_tokens=100", "max_new_tokens=10")
        names = {}
        with torch.device("meta" if "MixtralModel" in code else "cpu"):
            exec(compile(code, "page", "exec"), names)
        if "generated_ids" in names:
            prompt = names["model_inputs"]["input_ids"]
            assert 0 < names["generated_ids"].shape[1] - prompt.shape[1] <= 10
            assert torch.equal(names["generated_ids"][:, : prompt.shape[1]], prompt)
        if "generate_ids" in names:
            assert names["generate_ids"].shape[1] <= 30
        if "configuration" in names:
            assert names["configuration"] == MixtralConfig()


def test_a_prompt_is_continued_by_drawing(checkpoint):
    device = "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model_inputs = tokenizer(["My favourite condiment is"], return_tensors="pt").to(device)
    assert model.to(device) is model
    options = {"max_new_tokens": 10, "do_sample": True, "eos_token_id": None, "seed": 0}
    generated = model.generate(**model_inputs, **options)
    text = tokenizer.batch_decode(generated)[0]
    assert text.startswith("<s> My favourite condiment is")
    assert generated.shape == (1, model_inputs.input_ids.shape[1] + 10)
    assert torch.equal(generated, model.generate(**model_inputs, **options))


def test_max_length_counts_the_prompt(checkpoint):
    model = MixtralForCausalLM.from_pretrained(checkpoint, device="cpu")
    tokenizer = LlamaTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer("Hey, are you conscious? Can you talk to me?", return_tensors="pt")
    ids = model.generate(inputs.input_ids, max_length=30, eos_token_id=None)
    assert ids.shape == (1, 30)
    (text,) = tokenizer.batch_decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert text.startswith("Hey, are you conscious? Can you talk to me?")


def test_flash_attention_in_half_precision(checkpoint, flash_stands_in):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, torch_dtype=torch.float16, attn_implementation="flash_attention_2", device="cpu"
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    batch = tokenizer(["def f(x):", "Return"], return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=5)
    model.set_attn_implementation("eager")
    assert torch.equal(ids, model.generate(**batch, max_new_tokens=5))


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_that_is_not_there_says_so():
    with pytest.raises(UnsupportedError, match="flash-attn"):
        AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="flash_attention_2")


def test_a_default_model_is_described_before_it_is_allocated():
    configuration = MixtralConfig()
    with torch.device("meta"):
        model = MixtralModel(configuration)
    assert model.config is configuration
    assert sum(p.numel() for p in model.parameters()) == 46_702_792_704 - 32_000 * 4096


@torch.no_grad()
def test_all_weights_give_all_outputs(checkpoint):
    """Section 2 of the page: every output, on dense and packed weights alike."""
    model, tokenizer = qmix.load(
        checkpoint, dtype="float32", device="cpu", attn_implementation="eager", sliding_window=8
    )
    ids = torch.tensor([tokenizer.encode("Return the length of the list, or raise an error.")])
    out = model(
        ids,
        labels=ids,
        output_attentions=True,
        output_hidden_states=True,
        output_router_logits=True,
    )
    length, layers = ids.shape[1], model.config.num_hidden_layers
    assert out.logits.shape == (1, length, model.config.vocab_size)
    assert float(out.loss) < 12
    assert abs(float(out.aux_loss) - 2) < 0.5
    assert len(out.hidden_states) == layers + 1
    assert [(a > 0).sum(-1).max() for a in out.attentions] == [8] * layers
    assert [r.shape for r in out.router_logits] == [(length, 8)] * layers
    assert out.past_key_values.stored_length == 8
    past = model(ids[:, :11]).past_key_values
    rest = model(ids[:, 11:], past_key_values=past).logits
    assert (rest - out.logits[:, 11:]).abs().max() < 1e-3


@torch.no_grad()
def test_packed_weights_survive_save_and_load(checkpoint, tmp_path):
    model = MixtralForCausalLM.from_pretrained(checkpoint, device="cpu")
    model.save_pretrained(tmp_path / "again")
    shutil.copy(TINY / "tokenizer.model", tmp_path / "again")
    again, tokenizer = qmix.load(tmp_path / "again", device="cpu")
    ids = torch.tensor([tokenizer.encode("Return")])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_4_bit_batch_is_each_row_alone(checkpoint):
    model, tokenizer = qmix.load(checkpoint, dtype="float32", device="cpu", sliding_window=8)
    texts = ["Return", "Return the length of the list, or raise ValueError if it is"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=24, eos_token_id=None)
    for text, row in zip(texts, out, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        expected = model.generate(**alone, max_new_tokens=24, eos_token_id=None)[0]
        assert torch.equal(row[-len(expected) :], expected)
