"""`qmix serve` beside llama-cpp-python's server, on one GGUF file, turn by turn in one run.

`python -m qmix.evals.serve_peer FILE.gguf --llama PYTHON [--callers 1,8] [--turns 5] [--new 64]
[--json FILE]`. PYTHON is an interpreter with llama-cpp-python and what its server needs. Both get
the same prompts as text and the same number of tokens, by as many callers at a time; the programs
are compared by the median of the turns' quotients. Both run all the time, and one waits while the
other is asked. llama-cpp-python's server runs one request at a time.
"""

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch

from qmix.errors import QualityError
from qmix.evals import markdown
from qmix.evals.command import command_line, exit_code, numbers, publish, say
from qmix.evals.serving.http_call import Address, HttpCall
from qmix.evals.serving.questions import COMPLETIONS
from qmix.evals.serving.server_process import llama_server, qmix_server
from qmix.formats.metadata import read_metadata
from qmix.hub.local import shown_name
from qmix.planning import machine

_CONTEXT = 1024
_REQUESTS = 4  # of each caller in a turn
_WORDS = ("alpha", "beta", "gamma", "delta", "and", "the", "of", "list", "new", "time")
_PROMPT_WORDS = 40
OURS, THEIRS = "qmix", "llama-cpp-python"


@dataclass(frozen=True)
class Turn:
    """What callers saw in one turn.

    Attributes:
        first_s, between_s: the median of the seconds to the first token and between two.
    """

    tokens_per_s: float
    first_s: float
    between_s: float


@dataclass(frozen=True, kw_only=True)
class PeerTiming:
    """One server with a number of callers: medians of the turns.

    Attributes:
        of_ours: tokens a second in ours, the median of the turns' quotients.
    """

    callers: int
    server: str
    tokens_per_s: float
    first_s: float
    between_s: float
    of_ours: float


@dataclass(frozen=True, kw_only=True)
class PeerRecord:
    """One run."""

    command: str
    date: str
    cpu: str
    threads: int
    file: str
    versions: Mapping[str, str]
    turns: int
    new_tokens: int
    timings: tuple[PeerTiming, ...]

    def __str__(self) -> str:
        rows = [
            (
                str(timing.callers),
                timing.server,
                f"{timing.tokens_per_s:.0f}",
                f"{timing.of_ours:.2f}",
                f"{1e3 * timing.first_s:.0f} ms",
                f"{1e3 * timing.between_s:.1f} ms",
            )
            for timing in self.timings
        ]
        header = ("callers", "server", "tokens/s", "of qmix's", "first token", "between tokens")
        return f"{self.file}, {self.cpu}, {self.threads} threads\n\n{markdown.table(header, rows)}"


def measure_peer(
    model: Path, *, llama_python: str, callers: Sequence[int], turns: int, new: int
) -> PeerRecord:
    """Measure turn by turn.

    Raises:
        QmixError: no such file, or a server does not start or answers with an error.
    """
    threads = torch.get_num_threads()
    eos = read_metadata(model).config.eos_token_id
    ours = ("--device", "cpu", "--slots", str(max(callers)), "--ctx", str(_CONTEXT))
    theirs = (
        *("--model", str(model), "--n_ctx", str(_CONTEXT), "--n_threads", str(threads)),
        *("--n_threads_batch", str(threads), "--interrupt_requests", "False"),
    )
    found: dict[tuple[int, str], list[Turn]] = {
        (count, server): [] for count in callers for server in (OURS, THEIRS)
    }
    with qmix_server(str(model), *ours) as one, llama_server(llama_python, *theirs) as other:
        for turn in range(turns + 1):  # the first one warms up
            for count, server in found:
                address = (one if server == OURS else other).address
                measured = asyncio.run(_turn(address, count, new, seed=turn, banned=eos))
                say(f"turn {turn}, {count} callers, {server}: {measured.tokens_per_s:.0f} tokens/s")
                if turn:
                    found[count, server].append(measured)
    return PeerRecord(
        command=command_line("serve_peer"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=machine.processor(),
        threads=threads,
        file=shown_name(model),
        versions={"torch": torch.__version__, THEIRS: _version(llama_python)},
        turns=turns,
        new_tokens=new,
        timings=tuple(
            _timing(count, server, measured, found[count, OURS])
            for (count, server), measured in found.items()
        ),
    )


async def _turn(address: Address, callers: int, new: int, *, seed: int, banned: object) -> Turn:
    first: list[float] = []
    between: list[float] = []

    async def caller(number: int) -> None:
        draw = random.Random(f"{seed}.{number}")
        for _ in range(_REQUESTS):
            times = await _times(address, _body(draw, new, banned))
            first.append(times[1] - times[0])
            between.extend(after - before for before, after in pairwise(times[1:]))

    begun = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(callers)))
    elapsed = time.perf_counter() - begun
    tokens = callers * _REQUESTS * new
    return Turn(tokens / elapsed, statistics.median(first), statistics.median(between))


def _body(draw: random.Random, new: int, banned: object) -> dict[str, object]:
    """A prompt like no other, and a reply that no end token cuts."""
    return {
        "prompt": " ".join(draw.choice(_WORDS) for _ in range(_PROMPT_WORDS)),
        "max_tokens": new,
        "temperature": 0,
        "stream": True,
        "logit_bias": {str(banned): -100},
    }


async def _times(address: Address, body: dict[str, object]) -> list[float]:
    """When a request was sent, and when each piece of its text came.

    Raises:
        QualityError: the answer is an error.
    """
    times = [time.perf_counter()]
    async with HttpCall(address, COMPLETIONS, body) as call:
        if call.status != 200:
            raise QualityError("the server refused", found=await call.document())
        async for document in call.events():
            if document.get("choices") and document["choices"][0]["text"]:
                times.append(time.perf_counter())
    if len(times) < 3:
        raise QualityError("no text came")
    return times


def _timing(callers: int, server: str, turns: Sequence[Turn], ours: Sequence[Turn]) -> PeerTiming:
    pairs = zip(turns, ours, strict=True)
    return PeerTiming(
        callers=callers,
        server=server,
        tokens_per_s=statistics.median(turn.tokens_per_s for turn in turns),
        first_s=statistics.median(turn.first_s for turn in turns),
        between_s=statistics.median(turn.between_s for turn in turns),
        of_ours=statistics.median(turn.tokens_per_s / base.tokens_per_s for turn, base in pairs),
    )


def _version(python: str) -> str:
    code = "import llama_cpp; print(llama_cpp.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _print(options: argparse.Namespace) -> None:
    record = measure_peer(
        options.model,
        llama_python=options.llama,
        callers=options.callers,
        turns=options.turns,
        new=options.new,
    )
    publish(record, options.json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.serve_peer", description=__doc__)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--llama", required=True, metavar="PYTHON", help="with llama-cpp-python")
    parser.add_argument("--callers", type=numbers, default=(1, 8), help="at a time (1,8)")
    parser.add_argument("--turns", type=int, default=5, help="turns that count (5)")
    parser.add_argument("--new", type=int, default=64, help="tokens of a reply (64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the record to FILE")
    options = parser.parse_args(arguments)
    return exit_code("serve_peer", lambda: _print(options))


if __name__ == "__main__":
    sys.exit(main())
