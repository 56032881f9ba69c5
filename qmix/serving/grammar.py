"""Grammars: masks that keep a reply within a JSON schema, a regular expression or a grammar.

By llguidance, which is imported when the first is needed. A grammar is tried in a process that can
be ended; masks are computed in threads of their own, while the model runs. Knows no HTTP.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qmix.errors import QmixError, UsageError
from qmix.text.detokenizer import Pieces
from qmix.text.tokenizer import LlamaTokenizer
from qmix.text.worker_process import EndedWorkerError, WorkerProcess

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
_TRIALS, _KEPT = 2, 16
# Bounds on the work: about 20 ms for a grammar's expressions, 17 ms for a mask.
_LIMITS: Mapping[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
}


@dataclass(frozen=True)
class Grammar:
    """What a reply is to follow.

    Attributes:
        text: the grammar, in llguidance's own form.
        field: of the request that asked for it.
    """

    text: str
    field: str


class Grammars:
    """Compiles grammars for one tokenizer, and keeps those of late.

    Args:
        ends: ids that end a reply.

    Attributes:
        workers: compute the masks.
    """

    def __init__(self, tokenizer: LlamaTokenizer, ends: Sequence[int]) -> None:
        self._tokenizer, self._ends = tokenizer, list(ends)
        names = tokenizer.pieces.names
        controls = [(index, names[index]) for index in sorted(tokenizer.pieces.controls)]
        self._tokens = {"controls": controls, "end": self._ends[0] if self._ends else 0}
        self._lock = Lock()
        self._words: LLTokenizer | None = None
        self.workers = ThreadPoolExecutor(_THREADS, "qmix-grammar")
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._trying = ThreadPoolExecutor(_TRIALS, "qmix-trial")
        self._trials: SimpleQueue[WorkerProcess] = SimpleQueue()
        for _ in range(_TRIALS):
            self._trials.put(WorkerProcess(Path(__file__).with_name("grammar_worker.py")))

    def submit(self, grammar: str) -> "Future[LLMatcher]":
        """What `compiled` gives, at some time: each new grammar waits for those before it."""
        done: Future[LLMatcher] = Future()
        if (kept := self._of_late(grammar)) is None:
            return self._trying.submit(self.compiled, grammar)
        done.set_result(kept)
        return done

    def compiled(self, grammar: str) -> "LLMatcher":
        """A matcher of a grammar in llguidance's own form; each reply needs a copy.

        Raises:
            UsageError: it is none, or costs too much.
            ResourceError: no process can be started to try it.
        """
        from llguidance import LLMatcher, LLParserLimits

        if (kept := self._of_late(grammar)) is not None:
            return kept
        self._try(grammar)
        matcher = LLMatcher(
            self._vocabulary(), grammar, log_level=0, limits=LLParserLimits(**_LIMITS)
        )
        matcher.compute_bitmask()  # what cannot begin is refused now
        if matcher.is_error():
            raise _refused(matcher.get_error())
        with self._lock:
            self._kept[grammar] = matcher
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return matcher

    def _of_late(self, grammar: str) -> "LLMatcher | None":
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
            return self._kept.get(grammar)

    def _try(self, grammar: str) -> None:
        """Compile it where that can be ended.

        Raises:
            UsageError, ResourceError: as compiled.
        """
        worker = self._trials.get()
        try:
            reply = worker.answer({"grammar": grammar, "limits": _LIMITS, **self._tokens})
        except EndedWorkerError as error:
            raise _refused(str(error.found)) from None
        finally:
            self._trials.put(worker)
        if reply["error"]:
            raise _refused(reply["error"])

    def mask(self, matcher: "LLMatcher") -> "GrammarMask":
        """The mask of one reply."""
        return GrammarMask(matcher.deep_copy(), self.workers)

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

    def wait(self) -> None:
        """Until it is."""
        wait([self._next])

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


def _refused(error: str) -> UsageError:
    said = next(iter(error.splitlines()), "")
    return UsageError("not a grammar that can be followed", where="grammar", found=said[:200])


def of_schema(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a grammar; {"type": "object"} is any object.

    Raises:
        UsageError: it holds a number that llguidance does not read.
    """
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)
    except ValueError as error:
        raise UsageError("not a schema", where="grammar", found=str(error)[:200]) from None


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
