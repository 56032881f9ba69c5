"""Log-probabilities as OpenAI's two formats show them. Knows a tokenizer's pieces, and no model."""

from collections.abc import Sequence
from typing import Any

from qmix.serving.grammar import token_bytes
from qmix.serving.request import LogProb
from qmix.text.detokenizer import Pieces, StreamDetokenizer
from qmix.text.tokenizer import LlamaTokenizer

_LEAST = -9999.0  # stands for minus infinity, which JSON does not have


def of_chat(logprobs: Sequence[LogProb], pieces: Pieces) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""
    content = [
        {
            **_entry(each.id, each.logprob, pieces),
            "top_logprobs": [_entry(index, value, pieces) for index, value in each.top],
        }
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def of_completion(
    logprobs: Sequence[LogProb], tokenizer: LlamaTokenizer, prompt: Sequence[int], offset: int
) -> dict[str, Any]:
    """The `logprobs` of a completion's choice.

    Args:
        prompt: ids that stand before the first of them.
        offset: characters that stand before it.
    """
    pieces = tokenizer.pieces
    stream = StreamDetokenizer(tokenizer, prompt=prompt)
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += len(stream.put(each.id))
    return {
        "tokens": [_shown(each.id, pieces) for each in logprobs],
        "token_logprobs": [max(each.logprob, _LEAST) for each in logprobs],
        "top_logprobs": [_top(each, pieces) for each in logprobs],
        "text_offset": offsets,
    }


def _top(logprob: LogProb, pieces: Pieces) -> dict[str, float] | None:
    """By text; of tokens with one text the likeliest."""
    by_text: dict[str, float] = {}
    for index, value in logprob.top:
        by_text.setdefault(_shown(index, pieces), max(value, _LEAST))
    return by_text or None


def _entry(index: int, value: float, pieces: Pieces) -> dict[str, Any]:
    return {
        "token": _shown(index, pieces),
        "logprob": max(value, _LEAST),
        "bytes": list(token_bytes(index, pieces)),
    }


def _shown(index: int, pieces: Pieces) -> str:
    """A token as text; bytes that are no character as OpenAI writes them."""
    data = token_bytes(index, pieces)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
