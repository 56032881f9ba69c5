"""What a grammar costs a token of its own request, and of those that run beside it.

    python -m qmix.evals.serving.mask_cost MODEL [--requests 8] [--tokens 48] [--rounds 5]

Requests decode together, without HTTP: none of them masked, one, all, and one whose mask takes 20
ms. The cases take turns, and each round begins with another. A cell gives the median of the rounds
in milliseconds a token, and the median ratio to the unmasked case of its round. On a busy
machine the clock says little; the processor's times are of the scheduler's thread, and of all.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.evals import markdown
from qmix.evals.command import exit_code, say
from qmix.generation.config import GenerationConfig
from qmix.models.auto import load
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.serving.grammar import GrammarMask, Grammars, of_schema
from qmix.serving.limits import Limits
from qmix.serving.request import Ended, Event, Request, Ticket
from qmix.serving.scheduler import Scheduler
from qmix.text.tokenizer import LlamaTokenizer

CASES = ("none", "one", "all", "one, slow")
COLUMNS = {
    "masked": "its ms",
    "free": "others' ms",
    "scheduler": "scheduler's processor ms",
    "process": "all threads' processor ms",
}
_SLOW_S = 0.02
_PROMPT = "Return a list of numbers:"
# A reply that does not end before its tokens do.
_SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 10_000}


class SlowMask(GrammarMask):
    """One that takes longer than any is allowed to."""

    def _allowed(self, index: int | None = None) -> Tensor:
        time.sleep(_SLOW_S)
        return super()._allowed(index)


@dataclass(frozen=True)
class Cost:
    """Milliseconds a token.

    Attributes:
        masked, free: until the requests with a mask were done, and those without; 0: none.
        scheduler, process: of the processor, by the scheduler's thread and by all.
    """

    masked: float
    free: float
    scheduler: float
    process: float


class Caller:
    """A request, and when its last token came."""

    def __init__(self, ids: Sequence[int], tokens: int, mask: GrammarMask | None) -> None:
        config = GenerationConfig(max_new_tokens=tokens, do_sample=True, seed=7, eos_token_id=-1)
        self.ticket = Ticket(Request(ids, config, mask=mask), self._put)
        self.is_masked, self.ended_at, self.failed = mask is not None, 0.0, False

    def _put(self, event: Event) -> None:
        if isinstance(event, Ended):
            self.ended_at, self.failed = time.perf_counter(), event.finish != "length"


class MaskCost:
    """Times the cases on one model."""

    def __init__(
        self, model: MixtralForCausalLM, tokenizer: LlamaTokenizer, requests: int, tokens: int
    ) -> None:
        if tokens <= requests:
            raise UsageError(
                "out of range", where="--tokens", expected=f"more than {requests}", found=tokens
            )
        self._ids = tokenizer.encode(_PROMPT)
        limits = Limits(context=len(self._ids) + tokens + 16, slots=requests)
        self._scheduler = Scheduler(model, tokenizer, limits)
        self._grammars = Grammars(tokenizer, model.generation_config.eos_ids)
        self._matcher = self._grammars.compiled(of_schema(_SCHEMA))
        self._requests, self._tokens = requests, tokens

    def timed(self, case: str) -> Cost:
        """One run of a case; its prompts are read before the time begins."""
        masked = {"none": 0, "all": self._requests}.get(case, 1)
        callers = [
            Caller(self._ids, self._tokens, self._mask(case) if index < masked else None)
            for index in range(self._requests)
        ]
        for caller in callers:
            self._scheduler.submit(caller.ticket)
        self._scheduler.admit()
        for _ in callers:
            self._scheduler.step()
        clocks = (time.thread_time, time.process_time)
        begun, before = time.perf_counter(), [clock() for clock in clocks]
        while not self._scheduler.idle:
            self._scheduler.step()
        used = [clock() - at for clock, at in zip(clocks, before, strict=True)]
        assert not any(caller.failed for caller in callers)
        ms = 1e3 / (self._tokens - self._requests)

        def until(masked: bool) -> float:
            ends = [caller.ended_at for caller in callers if caller.is_masked is masked]
            return ms * (max(ends) - begun) if ends else 0.0

        return Cost(until(True), until(False), *(ms * each for each in used))

    def _mask(self, case: str) -> GrammarMask:
        if "slow" not in case:
            return self._grammars.mask(self._matcher)
        return SlowMask(self._matcher.deep_copy(), self._grammars.workers)


def measured(cost: MaskCost, rounds: int) -> list[list[Cost]]:
    """The costs of each case, by rounds that begin with another."""
    found: list[list[Cost]] = [[] for _ in CASES]
    for case in CASES:
        cost.timed(case)  # what is compiled or recorded at first is not counted
    for turn in range(rounds):
        for place in range(len(CASES)):
            at = (turn + place) % len(CASES)
            found[at].append(cost.timed(CASES[at]))
        say(f"round {turn + 1} of {rounds}")
    return found


def table(found: list[list[Cost]]) -> str:
    """The costs as markdown."""
    rows = [
        [case, *(_cell(costs, found[0], field) for field in COLUMNS)]
        for case, costs in zip(CASES, found, strict=True)
    ]
    return markdown.table(["masked", *COLUMNS.values()], rows)


def _cell(costs: list[Cost], plain: list[Cost], field: str) -> str:
    values = [getattr(cost, field) for cost in costs]
    if not all(values):
        return "-"
    bases = [getattr(cost, "free" if field == "masked" else field) for cost in plain]
    ratio = median(value / base for value, base in zip(values, bases, strict=True))
    return f"{median(values):.2f} ({ratio:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    for name, value in (("--requests", 8), ("--tokens", 48), ("--rounds", 5)):
        parser.add_argument(name, type=int, default=value)
    given = parser.parse_args(arguments)

    def work() -> None:
        model, tokenizer = load(given.model)
        with torch.no_grad():
            cost = MaskCost(model, tokenizer, given.requests, given.tokens)
            sys.stdout.write(table(measured(cost, given.rounds)))

    return exit_code("mask_cost", work)


if __name__ == "__main__":
    sys.exit(main())
