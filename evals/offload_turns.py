"""Decode steps of a model whose experts stay in their file, by ways of reading, turn by turn.

`python -m qmix.evals.offload_turns DIR --ram 8GiB [--turns 12] [--lose 0.6] [--cold]`. The ways:
`apart`, each tensor for itself and through the page cache; `together`, an expert in parts on
several threads, past the cache where that has no room; `ahead`, that and the next layer's experts
as soon as this one's have been chosen. Every turn decodes a token in each way. Random weights route
alike whatever the token is, so before each one so many of the experts in memory are lost by lot, as
a trained model's tokens would lose them; the lot is the same for all ways of a turn. With --cold
nothing of the files is in the page cache when a token begins; else each way finds what the page
cache has kept. The exit code is 5 if the memory was more than the budget.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from qmix import MixtralForCausalLM
from qmix.errors import QualityError, UsageError
from qmix.evals.command import exit_code
from qmix.evals.offload import peak_host_bytes
from qmix.experts.disk_store import DiskStore
from qmix.planning.byte_sizes import parse_size, show

WAYS = ("apart", "together", "ahead")


class Ways:
    """Switches between ways of reading.

    Raises:
        UsageError: the model's experts do not stay in a file.
    """

    def __init__(self, model: MixtralForCausalLM) -> None:
        if not isinstance(model.store, DiskStore):
            raise UsageError("all experts fit", where="--ram", expected="a smaller budget")
        self.store = model.store
        self._share = self.store.reader.cached_share

    def take(self, way: str) -> None:
        """Read so from now on."""
        reader = self.store.reader
        reader.apart = way == "apart"
        reader.cached_share = 1.0 if way == "apart" else self._share
        self.store.looks_ahead = way == "ahead"

    def lose(self, share: float, lot: Random) -> None:
        """Free a share of the slots, drawn by lot."""
        residency = self.store.residency
        self.store.end_token()
        residency.policy.heat = [lot.randrange(1 << 16) for _ in residency.policy.heat]
        residency.return_slots(residency.borrow(int(share * len(residency.states))))


def drop(directory: Path) -> None:
    """Take a checkpoint's files out of the page cache."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def turns(
    model: MixtralForCausalLM, number: int, share: float, clear: Callable[[], None]
) -> Iterator[tuple[Mapping[str, float], Mapping[str, Tensor]]]:
    """Seconds and logits of a token in each way, turn by turn."""
    ways, cache = Ways(model), model.new_cache(1)
    for turn in range(number):
        seconds, logits = {}, {}
        for way in (*WAYS[turn % 3 :], *WAYS[: turn % 3]):
            ways.take(way)
            ways.lose(share, Random(turn))
            clear()
            cache.rewind(0)
            begun = time.perf_counter()
            with torch.no_grad():
                logits[way] = model.next_logits(torch.tensor([[turn + 3]]), cache)
            seconds[way] = time.perf_counter() - begun
        yield seconds, logits


def compare(options: argparse.Namespace) -> None:
    """Print each turn's seconds, and then the ratios.

    Raises:
        QualityError: two ways gave different logits, or the memory exceeded the budget.
    """
    model = MixtralForCausalLM.from_pretrained(options.directory, ram=options.ram, max_context=64)
    found: list[Mapping[str, float]] = []

    def clear() -> None:
        if options.cold:
            drop(options.directory)

    for seconds, logits in turns(model, options.turns, options.lose, clear):
        found.append(seconds)
        sys.stdout.write("  ".join(f"{way} {seconds[way]:.3f} s" for way in WAYS) + "\n")
        sys.stdout.flush()
        if not all(torch.equal(logits[way], logits["apart"]) for way in WAYS):
            raise QualityError("two ways of reading gave different logits")
    for way in WAYS[1:]:
        ratios = [seconds["apart"] / seconds[way] for seconds in found]
        sys.stdout.write(f"{way}: {statistics.median(ratios):.2f} times the speed of apart\n")
    assert model.store is not None
    budget, peak = parse_size(options.ram, where="ram"), peak_host_bytes()
    sys.stdout.write(f"{model.store.statistics()}; budget {show(budget)}, peak {show(peak)}\n")
    if peak > budget:
        raise QualityError("the process exceeded its budget", found=show(peak))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.offload_turns", description=__doc__)
    parser.add_argument("directory", type=Path, help="checkpoint directory")
    parser.add_argument("--ram", required=True, help="budget of host memory, such as 8GiB")
    parser.add_argument("--turns", type=int, default=12, help="tokens in each way (12)")
    parser.add_argument("--lose", type=float, default=0.6, help="share of slots lost (0.6)")
    parser.add_argument("--cold", action="store_true", help="nothing in the page cache")
    options = parser.parse_args(arguments)
    return exit_code("offload_turns", lambda: compare(options))


if __name__ == "__main__":
    sys.exit(main())
