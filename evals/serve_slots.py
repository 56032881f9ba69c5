"""What slots gain: new tokens a second of 1 to 16 requests that run together, through the engine.

`python -m qmix.evals.serve_slots [MODEL] [--slots 1,2,4,8] [--turns 5] [--new 32] [--ram 4GiB]
[--json FILE]`. Every turn runs each number of requests once, and numbers are compared by the median
of the turns' quotients, so that other load on the machine affects them alike. Beside each stands
how many experts of a layer its rows need in one step, which is what they read.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from qmix.errors import QualityError
from qmix.evals import markdown
from qmix.evals.command import command_line, exit_code, numbers, publish, say
from qmix.evals.training import tiny_model
from qmix.generation.config import GenerationConfig
from qmix.hub.local import shown_name
from qmix.models.auto import load
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.options import LoadOptions
from qmix.planning import machine
from qmix.serving.limits import Limits
from qmix.serving.request import Ended, Event, Request, Ticket
from qmix.serving.scheduler import Scheduler
from qmix.text.tokenizer import LlamaTokenizer

_PROMPT = 16  # tokens
_NO_END = GenerationConfig(eos_token_id=-1)


@dataclass(frozen=True, kw_only=True)
class SlotsTiming:
    """Requests that run together.

    Attributes:
        tokens_per_s: of all of them, the median of the turns.
        gain: over the first number of requests, the median and the range of the turns' quotients.
        experts: of a layer that one step needs, on average; None where they are offloaded.
    """

    slots: int
    tokens_per_s: float
    gain: tuple[float, float, float]
    experts: float | None


@dataclass(frozen=True, kw_only=True)
class SlotsRecord:
    """One run."""

    command: str
    date: str
    cpu: str
    device: str
    threads: int
    checkpoint: str
    layers: int
    new_tokens: int
    turns: int
    timings: tuple[SlotsTiming, ...]

    def __str__(self) -> str:
        rows = [
            (
                str(timing.slots),
                f"{timing.tokens_per_s:.1f}",
                "{:.2f} ({:.2f} to {:.2f})".format(*timing.gain),
                "-" if timing.experts is None else f"{timing.experts:.1f}",
            )
            for timing in self.timings
        ]
        header = ("requests", "tokens/s", f"of {self.timings[0].slots}'s", "experts a step")
        return (
            f"{self.checkpoint}, {self.layers} layers, {self.cpu}, {self.threads} threads\n\n"
            f"{markdown.table(header, rows)}"
        )


class _Run:
    """Some requests that are decoded together.

    Attributes:
        tokens_per_s: of all of them, from when the last prompt has been read.
        ids: int64 (B, L), prompts and replies, as far as the shortest goes.
    """

    def __init__(
        self, model: MixtralForCausalLM, tokenizer: LlamaTokenizer, slots: int, new: int, seed: int
    ) -> None:
        """
        Raises:
            QualityError: a request failed.
        """
        draw = torch.Generator().manual_seed(seed)
        prompts = torch.randint(3, model.config.vocab_size, (slots, _PROMPT), generator=draw)
        config = _NO_END.updated({"max_new_tokens": new})
        scheduler = Scheduler(model, tokenizer, Limits(context=_PROMPT + new, slots=slots))
        self._replies = [_Reply(ids) for ids in prompts.tolist()]
        for reply in self._replies:
            scheduler.submit(Ticket(Request(tuple(reply.ids), config), reply))
        scheduler.admit()
        for _ in range(slots):
            scheduler.step()
        begun, before = time.perf_counter(), scheduler.counts.new_tokens
        while self._replies[0].ended is None:  # whose prompt was read first
            scheduler.step()
        elapsed = time.perf_counter() - begun
        self.tokens_per_s = (scheduler.counts.new_tokens - before) / elapsed
        scheduler.end_all("cancelled")
        if scheduler.counts.failed:
            raise QualityError("a request failed")
        shortest = min(len(reply.ids) for reply in self._replies)
        self.ids = torch.tensor([reply.ids[:shortest] for reply in self._replies])


class _Reply:
    """Ids of a prompt, and those that are told of its reply."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.ended: Ended | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Ended):
            self.ended = event
        else:
            self.ids.append(event.id)


@torch.no_grad()
def _experts_a_step(model: MixtralForCausalLM, ids: torch.Tensor) -> float:
    """How many experts of a layer one column of rows (B, L) needs, on average."""
    logits = model(ids.to(model.device), output_router_logits=True).router_logits
    chosen = torch.stack([each.topk(model.config.num_experts_per_tok).indices for each in logits])
    by_step = chosen.view(len(logits), *ids.shape, -1).transpose(1, 2).flatten(2)
    return float(torch.nn.functional.one_hot(by_step).amax(2).sum(-1).float().mean())


def measure_slots(
    model: Path, *, slots: Sequence[int], turns: int, new: int, ram: str | None
) -> SlotsRecord:
    """Measure turn by turn.

    Raises:
        QmixError: no such model, or a request failed.
    """
    options = LoadOptions(ram=ram, max_context=_PROMPT + new, max_batch=max(slots))
    loaded, tokenizer = load(model, load_options=options)
    rates: dict[int, list[float]] = {count: [] for count in slots}
    experts: dict[int, float] = {}
    for turn in range(turns + 1):  # the first one warms up
        for count in slots:
            run = _Run(loaded, tokenizer, count, new, seed=turn)
            say(f"turn {turn}, {count} requests: {run.tokens_per_s:.2f} tokens a second")
            if turn:
                rates[count].append(run.tokens_per_s)
            elif loaded.store is None:
                experts[count] = _experts_a_step(loaded, run.ids)
    return SlotsRecord(
        command=command_line("serve_slots"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=machine.processor(),
        device=str(loaded.device),
        threads=torch.get_num_threads(),
        checkpoint=shown_name(model),
        layers=loaded.config.num_hidden_layers,
        new_tokens=new,
        turns=turns,
        timings=tuple(
            SlotsTiming(
                slots=count,
                tokens_per_s=statistics.median(found),
                gain=_quotients(found, rates[slots[0]]),
                experts=experts.get(count),
            )
            for count, found in rates.items()
        ),
    )


def _quotients(rates: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and most, turn by turn."""
    found = [rate / one for rate, one in zip(rates, base, strict=True)]
    return statistics.median(found), min(found), max(found)


def _print(options: argparse.Namespace) -> None:
    record = measure_slots(
        options.model or tiny_model.directory(),
        slots=options.slots,
        turns=options.turns,
        new=options.new,
        ram=options.ram,
    )
    publish(record, options.json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.serve_slots", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="checkpoint (the tiny model)")
    parser.add_argument("--slots", type=numbers, default=(1, 2, 4, 8), help="(1,2,4,8)")
    parser.add_argument("--turns", type=int, default=5, help="turns that count (5)")
    parser.add_argument("--new", type=int, default=32, help="tokens of a reply (32)")
    parser.add_argument("--ram", help="budget of host memory, such as 4GiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the record to FILE")
    options = parser.parse_args(arguments)
    return exit_code("serve_slots", lambda: _print(options))


if __name__ == "__main__":
    sys.exit(main())
