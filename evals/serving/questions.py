"""Questions: what callers of a server under load ask it, drawn by a seed, and the right answers.

Most are prompts whose greedy reply is known from a run of the model alone. Knows no sockets.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qmix.generation.config import GenerationConfig
from qmix.generation.stopping import RowText
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.text.detokenizer import StreamDetokenizer
from qmix.text.tokenizer import LlamaTokenizer

# "cancels": closes the connection in the middle. "slow": hardly reads. "long": a prompt of 1 MB.
Kind = Literal["streams", "waits", "cancels", "slow", "malformed", "long"]
_SHARES: dict[Kind, int] = {
    "streams": 40,
    "waits": 20,
    "cancels": 20,
    "slow": 5,
    "malformed": 12,
    "long": 3,
}
COMPLETIONS = "/v1/completions"
_PROMPTS = 24
_BEGINNINGS = 4  # that prompts share
_LONGEST = 300  # tokens
_NEW = (2, 6, 16)
_LONG_BYTES = 1 << 20
# Each with the status that it deserves.
_MALFORMED: tuple[tuple[dict[str, Any] | bytes, int], ...] = (
    (b"", 400),
    (b'{"prompt": "a"', 400),
    (b"[1, 2]", 400),
    (b'{"prompt": "\xff"}', 400),
    (b'{"prompt": "a", "prompt": "b"}', 400),
    (b'{"prompt": "a", "temperature": NaN}', 400),
    (b'{"prompt": ' + b"[" * 100_000, 400),
    ({}, 400),
    ({"prompt": [10**9]}, 400),
    ({"prompt": "a", "max_tokens": -1}, 400),
    ({"prompt": "a", "n": 10**9}, 400),
    ({"prompt": "a", "logprobs": 10**6}, 400),
    ({"prompt": "a", "logit_bias": {"-1": 1}}, 400),
    ({"prompt": "a", "colour": "red"}, 400),
    ({"prompt": "a", "guided_regex": "("}, 400),
    ({"prompt": "a", "model": "another"}, 404),
)


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        status: of the right answer.
        text: of the right reply; None: there is none.
        events: of a stream after which a caller leaves.
    """

    kind: Kind
    body: dict[str, Any] | bytes
    status: int = 200
    text: str | None = None
    events: int = 0

    @property
    def streams(self) -> bool:
        """Whether the reply comes in events."""
        return isinstance(self.body, dict) and self.body.get("stream") is True


@dataclass(frozen=True)
class Reply:
    """A prompt and how many ids follow it, and what they say."""

    ids: tuple[int, ...]
    new: int
    text: str


def right_replies(
    model: MixtralForCausalLM, tokenizer: LlamaTokenizer, seed: int, prompts: int = _PROMPTS
) -> tuple[Reply, ...]:
    """Replies to drawn prompts, each from a run of its own; many prompts begin alike."""
    draw = random.Random(seed)

    def drawn(count: int) -> list[int]:
        return [draw.randrange(3, model.config.vocab_size) for _ in range(count)]

    beginnings = [drawn(draw.randrange(1, _LONGEST)) for _ in range(_BEGINNINGS)]
    config = model.generation_config.updated({"max_new_tokens": max(_NEW), "do_sample": False})
    replies = []
    for _ in range(prompts):
        begin = draw.choice(beginnings)
        ids = (*begin[: draw.randrange(1, len(begin) + 1)], *drawn(draw.randrange(1, 20)))
        whole = model.generate(torch.tensor([ids]), config)
        assert isinstance(whole, torch.Tensor)
        new_ids = whole[0, len(ids) :].tolist()
        replies += [Reply(ids, new, _text(new_ids[:new], ids, tokenizer, config)) for new in _NEW]
    return tuple(replies)


def _text(
    new: Sequence[int], prompt: Sequence[int], tokenizer: LlamaTokenizer, config: GenerationConfig
) -> str:
    """What new ids say behind a prompt, up to one that ends the text."""
    text = RowText(StreamDetokenizer(tokenizer, prompt=prompt), config.eos_ids, config.stops)
    parts = [text.put(each, last=at == len(new)) for at, each in enumerate(new, 1)]
    return "".join(parts)


def drawn(replies: Sequence[Reply], draw: random.Random) -> Question:
    """A question of any kind."""
    kind = draw.choices(list(_SHARES), list(_SHARES.values()))[0]
    if kind == "malformed":
        return Question(kind, *draw.choice(_MALFORMED))
    if kind == "long":
        words = draw.choice(("all work and no play ", "\u00e4\u20ac\U0001f600 ", "x"))
        text = (words * (_LONG_BYTES // len(words.encode()) + 1))[:_LONG_BYTES]
        return Question(kind, {"prompt": text}, 400)
    reply = draw.choice(replies)
    body = {
        "prompt": list(reply.ids),
        "max_tokens": reply.new,
        "temperature": 0,
        "stream": kind != "waits" and (kind != "cancels" or draw.random() < 0.8),
    }
    return Question(kind, body, text=reply.text, events=draw.randrange(reply.new))
