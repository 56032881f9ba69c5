"""Drafts from the text against plain decoding, turn by turn in one process.

`python -m qmix.evals.drafts DIR [--ram 4GiB] [--turns 5] [--new N] [--scatter] [--json FILE]`. The
replies are written (draft_tasks): both ways choose these ids, and compute what they would compute
for them. The ratio is of the processor's time after the first token, plain to drafted, of pairs in
changing order; its interval holds the median with 95 %. Random weights route nearly alike whatever
the token is: `--scatter` makes embeddings so large that routes depend on it.
"""

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import qmix
from qmix import strict_json
from qmix.errors import QualityError
from qmix.evals.command import exit_code, say
from qmix.evals.draft_tasks import TASKS, DraftTask
from qmix.generation.config import GenerationConfig
from qmix.generation.draft_counts import DraftCounts
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import stream
from qmix.generation.speculation import MOST_DRAFTED
from qmix.hub.local import shown_name
from qmix.planning import machine

_SCATTER = 100.0
_LEAST_RATIO = 0.97
_REPETITIONS = 9  # of a pass, whose median counts


class Script:
    """A logits processor that lets only a written reply's next id through.

    What stands there instead costs both ways the same.
    """

    def __init__(self, prompt: int, reply: Sequence[int]) -> None:
        self._prompt, self._reply = prompt, reply

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self._reply[input_ids.shape[1] - self._prompt]
        only = torch.full_like(scores, -torch.inf)
        only[:, wanted] = 0.0
        return only


@dataclass(frozen=True)
class Turn:
    """One reply: seconds after the first token by two clocks, reads of experts, and its drafts."""

    processor_s: float
    wall_s: float
    expert_reads: int
    drafts: DraftCounts | None


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """A task's pairs of turns.

    Attributes:
        ratio: plain to drafted, median and interval, of the processor's time. wall_ratio: likewise
            of the clock on the wall.
        expert_reads: from the file, for each id after the first: plain and drafted.
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    pairs: int
    ratio: tuple[float, float, float]
    wall_ratio: tuple[float, float, float]
    drafted: int
    accepted: int
    tokens_per_pass: float
    expert_reads: tuple[float, float]

    def __str__(self) -> str:
        middle, low, high = self.ratio
        return (
            f"{self.name}: {middle:.2f} ({low:.2f} to {high:.2f}) of plain, on the wall "
            f"{self.wall_ratio[0]:.2f}; {self.new_tokens} tokens after {self.prompt_tokens}, "
            f"{self.tokens_per_pass:.2f} a pass, {self.accepted} of {self.drafted} drafted accepted"
            + (
                f"; {self.expert_reads[1]:.2f} expert reads a token, plain {self.expert_reads[0]:.2f}"
                if any(self.expert_reads)
                else ""
            )
        )


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the order statistics that hold the true one with at least 95 %, if there are so
    many values; else the range.
    """
    ordered, count = sorted(values), len(values)
    chance, rank = 0.5**count, 0
    outside = chance
    while outside <= 0.025 and rank < count // 2:
        rank += 1
        chance *= (count - rank + 1) / rank
        outside += chance
    rank = max(rank - 1, 0)
    return median(ordered), ordered[rank], ordered[-1 - rank]


class Comparison:
    """One model, both ways."""

    def __init__(self, model: Any, tokenizer: Any, new: int | None) -> None:
        self._model, self._tokenizer, self._new = model, tokenizer, new
        self._cache = model.new_cache(1)
        self._task: DraftTask | None = None  # whose prompt the cache holds

    def ids(self, task: DraftTask) -> tuple[list[int], list[int]]:
        """Prompt and reply."""
        prompt = self._tokenizer.encode(f"[INST] {task.prompt} [/INST]")
        reply = self._tokenizer.encode(task.reply, add_special_tokens=False)
        return prompt, reply[: self._new]

    def turn(self, task: DraftTask, *, drafts: bool) -> Turn:
        """One reply."""
        prompt, reply = self.ids(task)
        config = GenerationConfig(
            max_new_tokens=len(reply),
            eos_token_id=-1,
            prompt_lookup_num_tokens=MOST_DRAFTED if drafts else None,
        )
        script = Script(len(prompt), reply)
        held = len(prompt) - 1 if task is self._task else 0
        self._cache.rewind(self._cache.longest_rewindable(held))
        self._task = task
        inputs = GenerationInputs(
            torch.tensor([prompt]), config, cache=self._cache, logits_processor=[script]
        )
        tokens, found = stream(self._model, inputs), []
        last = next(tokens)
        found.append(int(last.ids))
        reads = self._expert_reads()
        processor, wall = time.process_time(), time.perf_counter()
        for last in tokens:
            found.append(int(last.ids))
        seconds = time.process_time() - processor, time.perf_counter() - wall
        turn = Turn(*seconds, self._expert_reads() - reads, last.drafts)
        if found != reply:
            raise QualityError("drafts changed the text", where=task.name)
        return turn

    @staticmethod
    def _reads(turns: Sequence[Turn], reply: Sequence[int]) -> float:
        """Experts read for each id after the first."""
        return sum(turn.expert_reads for turn in turns) / (len(turns) * max(len(reply) - 1, 1))

    def _expert_reads(self) -> int:
        """Experts that have been read from the file so far; 0: all are in memory."""
        if self._model.store is None:
            return 0
        found = self._model.store.statistics()
        return int((found.disk_bytes + found.prefill_disk_bytes) // found.expert_bytes)

    def record(self, task: DraftTask, pairs: int) -> TaskRecord:
        """Pairs of turns, after one that warms up."""
        self.turn(task, drafts=True)
        plain: list[Turn] = []
        drafted: list[Turn] = []
        for index in range(pairs):
            for drafts in (index % 2 == 0, index % 2 == 1):
                (drafted if drafts else plain).append(self.turn(task, drafts=drafts))
        counts = sum((turn.drafts for turn in drafted if turn.drafts), DraftCounts())
        turns = list(zip(plain, drafted, strict=True))
        prompt, reply = self.ids(task)
        return TaskRecord(
            name=task.name,
            prompt_tokens=len(prompt),
            new_tokens=len(reply),
            pairs=pairs,
            ratio=interval([one.processor_s / other.processor_s for one, other in turns]),
            wall_ratio=interval([one.wall_s / other.wall_s for one, other in turns]),
            drafted=counts.drafted // pairs,
            accepted=counts.accepted // pairs,
            tokens_per_pass=counts.ids_per_pass,
            expert_reads=(self._reads(plain, reply), self._reads(drafted, reply)),
        )


def pass_costs(model: Any) -> dict[int, float]:
    """The processor's time of a pass over n rows of one text beside one row, by n."""
    from qmix.nn.cache_ahead import CacheAhead

    cache = model.new_cache(1, 256)
    ids = torch.randint(3, model.config.vocab_size, (1, 144), generator=torch.Generator())
    model.next_logits(ids[:, :128], cache)
    times: dict[int, list[float]] = {1: [], 2: [], 4: [], 8: [], 12: [], 16: []}
    for index in range(_REPETITIONS):
        for rows, found in times.items() if index % 2 else reversed(times.items()):
            ahead = CacheAhead(cache, rows)
            start = time.process_time()
            model.next_logits(
                ids[0, 128 : 128 + rows, None], ahead.rows, None, ahead.rows.position_ids()
            )
            found.append(time.process_time() - start)
    single = median(times[1])
    return {rows: round(median(found) / single, 2) for rows, found in times.items()}


def _measure(options: argparse.Namespace) -> None:
    model, tokenizer = qmix.load(options.directory, device="cpu", ram=options.ram)
    if options.scatter:
        embedding = model.model.embed_tokens.weight
        assert embedding is not None
        embedding.data.mul_(_SCATTER)
    exact, costs = model.exact_rows(), pass_costs(model)
    say(f"{exact} rows are each as alone; a pass beside one of one row: {costs}")
    comparison = Comparison(model, tokenizer, options.new)
    records = []
    for task in TASKS:
        records.append(comparison.record(task, options.turns))
        sys.stdout.write(f"{records[-1]}\n")
        sys.stdout.flush()
    if options.json is not None:
        document = {
            "command": f"python -m qmix.evals.drafts DIR --turns {options.turns}"
            + (" --scatter" if options.scatter else "")
            + (f" --ram {options.ram}" if options.ram else ""),
            "versions": {"qmix": qmix.__version__, "torch": torch.__version__},
            "machine": {
                "cpu": machine.processor(),
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
            },
            "checkpoint": shown_name(options.directory),
            "exact_rows": exact,
            "pass_costs": costs,
            "tasks": [asdict(record) for record in records],
        }
        strict_json.write(options.json, document, indent=1)
    slow = [record for record in records if record.ratio[2] < _LEAST_RATIO]
    if slow:
        raise QualityError(
            "drafts cost more than they give", expected=f"{_LEAST_RATIO}", found=str(slow[0])
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.drafts", description=__doc__)
    parser.add_argument("directory", type=Path, help="checkpoint directory")
    parser.add_argument("--ram", help="budget of host memory, such as 8GiB")
    parser.add_argument("--turns", type=int, default=5, help="pairs of turns a task (5)")
    parser.add_argument("--new", type=int, help="tokens of a reply at most (all)")
    parser.add_argument("--scatter", action="store_true", help="make routes depend on the token")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the record to FILE")
    options = parser.parse_args(arguments)
    return exit_code("drafts", lambda: _measure(options))


if __name__ == "__main__":
    sys.exit(main())
