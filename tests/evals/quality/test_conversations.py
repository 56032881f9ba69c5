"""Which ids of a conversation are scored, in the [INST] format and in a template."""

import json

import pytest

from qmix.errors import CheckpointError, UsageError
from qmix.evals.quality.conversations import read_conversations
from qmix.evals.quality.evaluation import score_all
from qmix.evals.quality.perplexity import Perplexity
from qmix.formats import open_checkpoint
from qmix.text import chat_template
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import ROOT

CHAT = [
    {"role": "user", "content": "def add"},
    {"role": "assistant", "content": "Return the sum."},
    {"role": "user", "content": "a list"},
    {"role": "assistant", "content": "Return a list of names."},
    {"role": "user", "content": "thanks"},
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def written(tmp_path):
    def write(*lines):
        path = tmp_path / "chats.jsonl"
        path.write_text(
            "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
        )
        return path  # fmt: skip

    return write


def windows(tiny, path, **options):
    tokenizer = LlamaTokenizer.from_pretrained(tiny)
    chats = read_conversations(path, **options)
    return chats.windows(open_checkpoint(tiny), tokenizer, []), tokenizer


def answers(found, tokenizer, row=0):
    """The runs of scored ids, as text."""
    runs, before = [], False
    for index, on in zip(found.ids[row].tolist(), found.scored[row].tolist(), strict=True):
        if on and not before:
            runs.append([])
        if on:
            runs[-1].append(index)
        before = on
    return [tokenizer.decode(run) for run in runs]


def test_the_answers_and_their_ends_are_scored_and_nothing_else(tiny, written):
    found, tokenizer = windows(tiny, written({"messages": CHAT}, CHAT[:2]))
    assert answers(found, tokenizer) == ["Return the sum.</s>", "Return a list of names.</s>"]
    assert answers(found, tokenizer, 1) == ["Return the sum.</s>"]
    whole = chat_template.encode(CHAT[:3], tokenizer)
    answered = tokenizer.encode("Return the sum.</s>", add_special_tokens=False)
    assert found.ids[0].tolist()[: len(whole)] == whole
    shorter = len(chat_template.encode(CHAT[:1], tokenizer)) + len(answered)
    assert not found.scored[1, shorter:].any()
    assert "2 conversations by the chat template inst" in found.protocol


def test_the_template_is_applied(tiny, written, tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    path = written(CHAT)
    found, tokenizer = windows(tiny, path, template=str(tmp_path / "own.jinja"))
    assert [each.strip() for each in answers(found, tokenizer)] == [
        "Return the sum.</s>",
        "Return a list of names.</s>",
    ]
    assert "<|user|>def add<|assistant|>" in tokenizer.decode(found.ids[0].tolist())


def test_a_template_that_hides_earlier_answers_is_refused(tiny, written, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[-1].content }}")
    with pytest.raises(UsageError, match=r"conversation 1.*otherwise than behind its prompt"):
        windows(tiny, written(CHAT), template=str(tmp_path / "own.jinja"))


def test_long_conversations_are_cut_and_said(tiny, written):
    found, _ = windows(tiny, written(CHAT, CHAT[:2]), size=30)
    assert found.ids.shape[1] <= 30
    assert "2 conversations" in found.protocol
    assert "1 cut at 30 tokens, 0 dropped" in found.protocol
    with pytest.raises(UsageError, match="no answer fits"):
        windows(tiny, written(CHAT), size=3)
    with pytest.raises(UsageError, match="2 to 1024"):
        windows(tiny, written(CHAT), size=1025)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2.*no JSON"),
        ({"text": "x"}, "line 2.*something else"),
        ([{"role": "user"}], "line 2.*something else"),
        (CHAT[:1], "line 2.*no answer"),
        ("[" * 100_000, "line 2.*no JSON"),
    ],
    ids=["no json", "no messages", "no content", "no answer", "too deep"],
)
def test_a_line_that_is_no_conversation_is_named(written, line, said):
    with pytest.raises(CheckpointError, match=said):
        read_conversations(written(CHAT, line))


def test_roles_out_of_order_name_their_conversation(tiny, written):
    with pytest.raises(UsageError, match=r"conversation 2.*out of order"):
        windows(tiny, written(CHAT, [CHAT[0], CHAT[0], CHAT[1]]))
    with pytest.raises(CheckpointError, match="no conversations"):
        read_conversations(written("", " "))


def test_the_shipped_chats_have_an_interval_by_conversation(tiny, tiny_nf4):
    chats = read_conversations(ROOT / "evals" / "tasks" / "chats.jsonl")
    cut, (scores,) = score_all([tiny_nf4], chats, reference=tiny, device="cpu")
    result = Perplexity.of(scores, cut, chats.text.sha256)
    assert len(result.windows) == len(chats.chats) == 12
    assert result.reference.kl_interval.low < result.reference.kl_mean
    assert result.reference.kl_mean < result.reference.kl_interval.high
    alone, _ = windows(tiny, ROOT / "evals" / "tasks" / "chats.jsonl")
    assert result.tokens == int(alone.scored.sum())
