"""A ChatML fine-tune as transformers 5 saves it: tokenizer.json, two more tokens, a template."""

import shutil

import pytest
import torch
from tokenizers import AddedToken

import qmix
from qmix.errors import CUT_REPLY
from qmix.generation.config import GenerationConfig
from qmix.text.chat_format import chat_format
from tests.support.chat_templates import CHATML
from tests.support.fast_tokenizers import fast, write
from tests.support.models import TINY
from tests.support.process import qmix as qmix_command
from tests.support.process import session_of, typed

transformers = pytest.importorskip("transformers")

QUESTION = [{"role": "user", "content": "hi there"}]
START, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatml") / "m"
    config = transformers.MixtralConfig(
        vocab_size=2056,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    added = [AddedToken(END, special=True, normalized=False), AddedToken(START, normalized=False)]
    tokenizer = fast((TINY / "tokenizer.model").read_bytes(), spaces="none", added=added)
    # The fine-tune kept </s> as its end: only the template says how a reply ends.
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
    write(folder, tokenizer, **names)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def test_ids_and_logits_are_transformers(folder):
    model, tokenizer = qmix.load(folder, dtype="float32", device="cpu")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(QUESTION, return_tensors="pt")
    assert ids.tolist() == [
        theirs.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    ]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    card = tokenizer.apply_chat_template(QUESTION, return_tensors="pt", return_dict=True)
    new = model.generate(**card, max_new_tokens=4, do_sample=False)
    expected = other.generate(**card, max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert new.tolist() == expected.tolist()


def test_a_chat_asks_by_the_template_and_ends_at_its_mark(folder):
    model, tokenizer = qmix.load(folder, dtype="float32", device="cpu")
    form = chat_format(tokenizer)
    end = tokenizer.convert_tokens_to_ids(END)
    assert form.end_ids == (end,)
    spoken = tokenizer.encode("Hello", add_special_tokens=False)
    wanted = iter([*spoken, end, *spoken, end])
    model.next_logits = lambda *_, **__: torch.nn.functional.one_hot(
        torch.tensor([next(wanted)]), 2056
    ).float()
    config = GenerationConfig(max_new_tokens=20, eos_token_id=[2, end], do_sample=False)
    session = session_of(model, tokenizer, config, chat_format=form)
    text, _ = typed(session, "hi there\nmore\n")
    assert text == "Hello\nHello\n"
    prompt = session.prepare("last")
    shown = tokenizer.decode(prompt.ids)
    assert shown.count("Hello<|im_end|>\n") == 2
    assert shown.endswith(f"{START}user\nlast{END}\n{START}assistant\n")


def test_quantizing_keeps_tokenizer_and_template(folder, tmp_path):
    done = qmix_command("quantize", folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "tokenizer" not in done.stderr
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    short = ("--max-new-tokens", 2, "--device", "cpu")
    for more, name in (((), "the checkpoint's own, default"), (("--template", "inst"), None)):
        done = qmix_command("chat", tmp_path / "out", *short, *more, stdin="hi\n")
        assert done.returncode in (0, CUT_REPLY), done.stderr
        assert done.stderr.startswith("cut short" if name is None else f"template: {name}\n")
    done = qmix_command("chat", tmp_path / "out", *short, "--template", "none", stdin="hi\n")
    assert done.returncode == 2
    assert "one of default, inst, or a file" in done.stderr


def test_a_checkpoint_without_a_tokenizer_is_quantized_with_a_warning(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").write_text("{}")
    done = qmix_command("quantize", bare, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "has no tokenizer that works" in done.stderr
    assert "tokenizer.json: not a tokenizer" in done.stderr
