"""What a layer would take on more threads than this machine has: predictions, not measurements.

`python -m qmix.evals.threads [--format NAME] [--tokens 1,512] [--threads 1,2,4,8,16,64]` splits
one layer of the 8x7B's width for each number of threads, runs all pieces on one, and computes from
their times what as many threads would take (evals.timing.thread_split says by which model). A
machine's memory is taken to feed `--memory` GB/s, by default eight channels of DDR5-4800; one core
here reads as fast as the pieces of one token show.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.evals import markdown
from qmix.evals.command import command_line, exit_code, numbers, say
from qmix.evals.timing.cpu_layer import bytes_of_token, forward_layers
from qmix.evals.timing.random_layer import FORMATS, random_layer
from qmix.evals.timing.thread_split import Machine, Prediction, predict, split_of
from qmix.nn.attention import ForwardContext

_TURNS = {True: 15, False: 2}  # of one token, of more
_HEADER = (
    *("tokens", "threads", "ms", "times as fast", "efficiency", "work", "idle", "counter"),
    *("memory", "forks", "serial", "outside"),
)


def predictions(
    config: MixtralConfig,
    weight_format: str,
    tokens: int,
    threads: Sequence[int],
    memory_bytes: float,
) -> list[Prediction]:
    """A layer of random weights on each number of threads.

    Args:
        memory_bytes: bytes a second that the memory feeds to all cores.
    """
    layer = random_layer(config, weight_format)
    context = ForwardContext.without_past(config, tokens, torch.device("cpu"), torch.bfloat16)
    x = torch.randn(1, tokens, config.hidden_size).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            forward_layers([layer], x, context)
            splits = [
                split_of(lambda: forward_layers([layer], x, context), count, _TURNS[tokens == 1])
                for count in threads
            ]
    finally:
        torch.set_num_threads(before)
    machine = Machine()
    if tokens == 1:
        one_core = bytes_of_token(layer) / min(split.seconds for split in splits)
        machine = Machine(speedup=memory_bytes / one_core)
    return [predict(split, machine) for split in splits]


def _rows(tokens: int, found: Sequence[Prediction]) -> list[tuple[str, ...]]:
    rows = []
    for each in found:
        regions = (each.work, each.idle, each.counter, each.memory, each.forks)
        parts = (*regions, each.serial, each.outside)
        faster = found[0].seconds * found[0].threads / each.seconds
        rows.append(
            (
                *(str(tokens), str(each.threads), f"{1e3 * each.seconds:.3f}", f"{faster:.1f}"),
                f"{faster / each.threads:.0%}",
                *(f"{1e3 * part:.3f}" for part in parts),
            )
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.threads", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the record to FILE")
    parser.add_argument("--format", choices=FORMATS, default="int4 g128")
    parser.add_argument("--tokens", type=numbers, default=(1, 512), metavar="T,...")
    parser.add_argument("--threads", type=numbers, default=(1, 2, 4, 8, 16, 64), metavar="N,...")
    parser.add_argument("--memory", type=float, default=307.2, metavar="GB/s")
    options = parser.parse_args(arguments)

    def work() -> None:
        found = {}
        for tokens in options.tokens:
            say(f"{options.format}, {tokens} tokens")
            found[tokens] = predictions(
                MixtralConfig(), options.format, tokens, options.threads, 1e9 * options.memory
            )
        rows = [row for tokens, each in found.items() for row in _rows(tokens, each)]
        sys.stdout.write(f"predicted, in ms:\n\n{markdown.table(_HEADER, rows)}\n")
        if options.json:
            record = {str(tokens): [asdict(one) for one in each] for tokens, each in found.items()}
            command = command_line("threads")
            strict_json.write(options.json, {"command": command, "predictions": record})

    return exit_code("threads", work)


if __name__ == "__main__":
    sys.exit(main())
