"""Grammars: masks that keep a reply within a JSON schema, a regular expression or a grammar.

By llguidance, which is imported when the first is needed. Masks are computed in threads of their
own, while the model runs. Knows no HTTP.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qmix.errors import QmixError, UsageError
from qmix.text.detokenizer import Pieces
from qmix.text.tokenizer import LlamaTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# One way to write a document: a small model would fill its reply with white space.
_JSON: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_THREADS = 2  # a mask takes microseconds as a rule; two of them let one that is slow pass


class Grammars:
    """Compiles grammars for one tokenizer; threads wait for each other only at the first.

    Args:
        ends: ids that end a reply.
    """

    def __init__(self, tokenizer: LlamaTokenizer, ends: Sequence[int]) -> None:
        self._tokenizer, self._ends = tokenizer, list(ends)
        self._lock = Lock()
        self._words: LLTokenizer | None = None
        self._workers = ThreadPoolExecutor(_THREADS, "qmix-grammar")

    def compiled(self, grammar: str) -> "LLMatcher":
        """A matcher of a grammar in llguidance's own form; each reply needs a copy.

        Raises:
            UsageError: it is none, or too complex.
        """
        from llguidance import LLMatcher, LLParserLimits

        # Bounds on the work: about 20 ms for a grammar's expressions, 17 ms for a mask.
        limits = LLParserLimits(
            max_items_in_row=2000,
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=200_000,
            step_max_items=50_000,
            max_lexer_states=50_000,
            max_grammar_size=100_000,
        )
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            said = next(iter(matcher.get_error().splitlines()), "")
            raise UsageError(
                "not a grammar that can be followed", where="grammar", found=said[:200]
            )
        return matcher

    def mask(self, matcher: "LLMatcher") -> "GrammarMask":
        """The mask of one reply."""
        return GrammarMask(matcher.deep_copy(), self._workers)

    def _vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._words is None:
                wrapped = TokenizerWrapper(_Words(self._tokenizer))
                self._words = LLTokenizer(wrapped, eos_token=self._ends)
            return self._words


class GrammarMask:
    """What may follow in one reply; see qmix.serving.request.Mask.

    Args:
        matcher: nobody else's.
        workers: compute its masks.
    """

    def __init__(self, matcher: "LLMatcher", workers: Executor) -> None:
        self._matcher, self._workers = matcher, workers
        self._next: Future[Tensor] = workers.submit(self._allowed)

    @property
    def ready(self) -> bool:
        """Whether a call would not wait."""
        return self._next.done()

    def advance(self, index: int) -> None:
        """Go on behind an id."""
        self._next = self._workers.submit(self._allowed, index)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, V), excluded ids at -inf.

        Raises:
            QmixError: the grammar costs too much to go on with.
        """
        allowed = self._next.result()
        mask = torch.zeros(scores.shape[1], dtype=torch.bool)
        mask[: len(allowed)] = allowed[: len(mask)]
        return scores.masked_fill(~mask.to(scores.device), -torch.inf)

    def _allowed(self, index: int | None = None) -> Tensor:
        """Whether each id may follow, bool (V,)."""
        if index is not None:
            self._matcher.consume_token(index)
        bias = self._matcher.compute_logit_bias()
        if self._matcher.is_error():
            said = next(iter(self._matcher.get_error().splitlines()), "")
            raise QmixError("the grammar cannot be followed", found=said[:200])
        return torch.frombuffer(bytearray(bias), dtype=torch.uint8).bool()


class _Words:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.pieces.controls)
        self.tokens = [token_bytes(i, tokenizer.pieces) for i in range(len(tokenizer.pieces.names))]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("a string")  # llguidance asks whether bytes are taken
        return self._tokenizer.continued(text)


def token_bytes(index: int, pieces: Pieces) -> bytes:
    """What a token stands for; a control token for its name."""
    if index >= len(pieces.names):  # a row of a padded embedding
        return b""
    if index in pieces.controls:
        return pieces.names[index].encode()
    return pieces.bytes_by_id.get(index) or pieces.texts[index].encode()


def of_schema(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a grammar; {"type": "object"} is any object."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(dict(schema), overrides=_JSON)


def of_regex(regex: str) -> str:
    """A regular expression, of the whole reply, as a grammar."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(regex)


def of_lark(text: str) -> str:
    """A grammar of llguidance's, in Lark's syntax, as a grammar."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(text)


def of_text(text: str) -> str:
    """A grammar in Lark's syntax, or in llama.cpp's GBNF, whose first rule is `root`.

    Raises:
        UsageError: it is neither.
    """
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return of_lark(any_to_lark(text))
    except Exception as error:  # noqa: BLE001 - what its parser raises is not documented
        raise UsageError("not a grammar", where="grammar", found=str(error)[:200]) from None


def inline(schema: Mapping[str, Any]) -> str:
    """A JSON schema as an item of a rule in Lark's syntax."""
    return "%json " + json.dumps({**schema, "x-guidance": _JSON})
