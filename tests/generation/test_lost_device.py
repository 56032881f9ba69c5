"""A GPU that fails in the middle: one error that says what to do; what was said is kept."""

import pytest

from qmix.errors import ResourceError, of_device
from qmix.generation.config import GenerationConfig
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import ROOT, ids, small_model
from tests.support.process import PATIENCE, Terminal, session_of
from tests.support.process import qmix as command

LOST = (
    "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported "
    "at some other API call, so the stacktrace below might be incorrect."
)


def lose_after(monkeypatch, steps, message=LOST, owner=MixtralForCausalLM):
    """Let every step from then on fail, whatever it does."""
    step, count = owner.next_logits, 0

    def counted(*arguments):
        nonlocal count
        count += 1
        if count > steps:
            raise RuntimeError(message)
        return step(*arguments)

    monkeypatch.setattr(owner, "next_logits", counted)


def test_the_error_names_what_happened_and_what_to_do(monkeypatch):
    model = small_model()
    lose_after(monkeypatch, 2)
    with pytest.raises(ResourceError, match=r"GPU failed.*launch failure\. Start again") as caught:
        model.generate(ids(5), max_new_tokens=9, do_sample=False)
    assert "stacktrace" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_memory_that_ends_is_another_error(monkeypatch):
    lose_after(monkeypatch, 2, "CUDA error: out of memory\nmore")
    with pytest.raises(ResourceError, match=r"no memory left.*smaller vram"):
        small_model().generate(ids(5), max_new_tokens=9, do_sample=False)


@pytest.mark.parametrize("message", ["mat1 and mat2 must have the same dtype", "no CUDA error"])
def test_other_errors_stay_what_they_are(monkeypatch, message):
    assert of_device(RuntimeError(message)) is None
    lose_after(monkeypatch, 2, message)
    with pytest.raises(RuntimeError, match=message):
        small_model().generate(ids(5), max_new_tokens=9, do_sample=False)


def test_a_command_ends_with_one_line_and_the_code_of_resources(monkeypatch, tiny):
    lose_after(monkeypatch, 2)
    done = command("generate", tiny, "Hello", "--device", "cpu", "--temperature", 0)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "GPU failed" in done.stderr


def test_a_failure_outside_of_generation_is_named_too(monkeypatch, tiny):
    def fails(*_, **__):
        raise RuntimeError(LOST)

    monkeypatch.setattr(MixtralForCausalLM, "from_pretrained", fails)
    done = command("bench", tiny, "--device", "cpu")
    assert done.returncode == 4
    assert "GPU failed" in done.stderr


def test_the_reply_so_far_is_kept_in_the_conversation(monkeypatch, tiny):
    tokenizer = LlamaTokenizer.from_pretrained(tiny)
    model = small_model(vocab_size=len(tokenizer), num_hidden_layers=1)
    session = session_of(model, tokenizer, GenerationConfig(max_new_tokens=9, eos_token_id=2))
    lose_after(monkeypatch, 3)
    with pytest.raises(ResourceError):
        list(session.reply(session.prepare("hello")))
    (turn,) = session.turns
    assert turn.user == "hello"
    assert len(turn.answer) == session.stats.new_tokens > 0


LOSING = f"""
import sys
if sys.orig_argv[1] != "-c":  # the chat itself, and not what starts it
    from qmix.models.causal_lm import MixtralForCausalLM
    def fails(*_): raise RuntimeError({LOST!r})
    MixtralForCausalLM.next_logits = fails
"""


def test_the_history_of_a_chat_outlives_the_card(tiny, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LOSING)
    state = {"XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with Terminal.of("chat", tiny, "--device", "cpu", **state) as chat:
        chat.until_prompt()
        chat.send("What is a list?\n")
        chat.until("Start again")
        assert chat.process.wait(PATIENCE) == 4
    assert "What is a list?" in (tmp_path / "qmix" / "chat_history").read_text()
