"""The program that tries a grammar out, in a process of its own with limits on time and memory.

What llguidance may spend on masks is bounded by fuel; on schemas it is not: patterns that must all
match are intersected for as long as it takes. So each new grammar is compiled here before the
server does. Run in a worker_process.py. Imports nothing of qmix.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

CPU_SECONDS = 2
MEMORY_BYTES = 1 << 30


class Bytes:
    """A tokenizer of single bytes, in llguidance's form, with the control tokens of another."""

    bos_token_id = None

    def __init__(self, controls: Mapping[int, str], end: int) -> None:
        self.eos_token_id = end
        self.special_token_ids = sorted(controls)
        self.tokens = [b""] * (max(controls, default=0) + 257)
        free = (index for index in range(len(self.tokens)) if index not in controls)
        self._ids = dict(zip(range(256), free, strict=False))
        for value, index in self._ids.items():
            self.tokens[index] = bytes([value])
        for index, name in controls.items():
            self.tokens[index] = name.encode()

    def __call__(self, text: bytes) -> list[int]:
        return [self._ids[value] for value in text]


@lru_cache(maxsize=1)
def _words(controls: tuple[tuple[int, str], ...], end: int) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Bytes(dict(controls), end)))


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """What is wrong with a grammar under limits; an empty text: nothing."""
    limits = LLParserLimits(**question["limits"])
    words = _words(tuple(map(tuple, question["controls"])), question["end"])
    matcher = LLMatcher(words, question["grammar"], log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return {"error": matcher.get_error() if matcher.is_error() else ""}
