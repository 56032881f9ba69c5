"""What reading the next layer's experts early would gain, on a disk that is modelled.

`python -m qmix.evals.routing.look_ahead [TRACE] [--slots 36,80] [--disk 0.85,4] [--right 0.6,1]`
prints, for each number of slots and disk, the milliseconds of a token without guesses, and how many
times as fast it is with guesses that are so often right, and with a disk of twice the rate. Without
a TRACE (`qmix trace record`) the tokens are drawn: 32 layers of 8 experts, popularity log-normal
with sigma 0.4, a choice stays with probability 0.25. A layer takes 1 ms before its router, and 3 ms
for each expert, as on two cores at 30 GB/s. The disk reads one expert at a time in 12 parts; what
was guessed wrongly ends at its next part. Knows no tensors.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from qmix.evals.command import exit_code
from qmix.evals.routing.trace import read_trace
from qmix.experts.policy import HEAT, Policy
from qmix.experts.residency import Residency
from qmix.weights.blob import READ_BUFFERS

_EXPERT_BYTES = 90_882_048  # of the 8x7B in NF4 with nested scales
_ROUTER_MS, _EXPERT_MS, _PARTS = 1.0, 3.0, 12
_DRAWN = 150  # tokens


@dataclass
class Disk:
    """One read at a time; those that were guessed go on while nothing else is asked for.

    Attributes:
        read_ms: of an expert. free_at: when the last read that began will have ended.
        left: milliseconds that a guessed expert still takes, in the order of the guesses.
    """

    read_ms: float
    free_at: float = 0.0
    left: dict[int, float] = field(default_factory=dict)

    def run(self, until: float) -> None:
        """Read what was guessed, part by part; the last part may end later."""
        for expert in self.left:
            while self.left[expert] > 0 and self.free_at < until:
                part = min(self.read_ms / _PARTS, self.left[expert])
                self.free_at += part
                self.left[expert] -= part

    def needed(self, expert: int, now: float) -> float:
        """When an expert is there that is needed now."""
        left = self.left.pop(expert, self.read_ms)
        if left > 0:
            self.free_at = max(self.free_at, now) + left
        return max(self.free_at if left > 0 else now, now)


def token_ms(
    tokens: Sequence[Sequence[Sequence[int]]],
    per_layer: int,
    slots: int,
    read_ms: float,
    right: float,
) -> float:
    """The mean time of a token.

    Args:
        tokens: the experts of each layer, by their ids over all layers.
        right: the share of guesses that come true; 0: nothing is guessed.
    """
    lot, layers = Random(0), len(tokens[0])
    policy = Policy(layers * per_layer, replace(HEAT, uploads=0))
    residency, disk, now = Residency(layers * per_layer, slots, policy), Disk(read_ms), 0.0
    for warmed in residency.warm(policy.order(per_layer)):
        residency.ready(warmed)
    for token in tokens:
        for layer, ids in enumerate(token):
            now += _ROUTER_MS
            disk.run(now)
            there = []
            for expert in sorted(ids):
                upload = residency.fetch(expert, set(ids))
                there.append(now if upload is None else disk.needed(expert, now))
                if upload is not None:
                    residency.ready(upload)
            disk.left.clear()
            if right and layer + 1 < layers:
                guessed = _guessed(token[layer + 1], per_layer, right, lot)
                missing = [expert for expert in guessed if not residency.in_slot(expert)]
                disk.left = dict.fromkeys(missing[:READ_BUFFERS], read_ms)
                disk.free_at = max(disk.free_at, now)
            for begin in there:
                now = max(now, begin) + _EXPERT_MS
            disk.run(now)
        residency.token([expert for ids in token for expert in ids])
        disk.left.clear()
    return now / len(tokens)


def _guessed(ids: Sequence[int], per_layer: int, right: float, lot: Random) -> list[int]:
    first = ids[0] - ids[0] % per_layer
    others = [each for each in range(first, first + per_layer) if each not in ids]
    return [each if lot.random() < right else lot.choice(others) for each in ids]


def drawn(layers: int = 32, experts: int = 8, chosen: int = 2) -> Iterator[list[list[int]]]:
    """Tokens with popular experts that tend to stay; see the module's docstring."""
    lot = Random(0)
    weights = [[lot.lognormvariate(0, 0.4) for _ in range(experts)] for _ in range(layers)]
    before: list[list[int]] = [[] for _ in range(layers)]
    for _ in range(_DRAWN):
        token = []
        for layer in range(layers):
            ids = [each for each in before[layer] if lot.random() < 0.25]
            while len(ids) < chosen:
                one = lot.choices(range(experts), weights[layer])[0] + layer * experts
                ids += [one] if one not in ids else []
            token.append(ids)
        before = token
        yield token


def compare(options: argparse.Namespace) -> None:
    """Print the table."""
    if options.trace is None:
        tokens, per_layer = list(drawn()), 8
    else:
        trace = read_trace(options.trace)
        tokens, per_layer = list(trace.ids()), trace.header.experts
    for slots in options.slots:
        for rate in options.disk:
            read_ms = _EXPERT_BYTES / rate / 1e6
            plain = token_ms(tokens, per_layer, slots, read_ms, 0)
            gains = [
                f"{right:.2f} right {plain / token_ms(tokens, per_layer, slots, read_ms, right):.3f}"
                for right in options.right
            ]
            twice = plain / token_ms(tokens, per_layer, slots, read_ms / 2, 0)
            sys.stdout.write(
                f"{slots} slots, {rate:g} GB/s: {plain:.0f} ms a token; {', '.join(gains)}; "
                f"disk of twice the rate {twice:.2f}\n"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""

    def numbers(text: str) -> list[float]:
        return [float(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="python -m qmix.evals.routing.look_ahead", description=__doc__
    )
    parser.add_argument("trace", type=Path, nargs="?", help="written by qmix trace record")
    parser.add_argument(
        "--slots", type=lambda text: [int(each) for each in text.split(",")], default=[36, 80]
    )
    parser.add_argument("--disk", type=numbers, default=[0.85, 4.0, 7.0], help="GB/s")
    parser.add_argument("--right", type=numbers, default=[0.6, 0.75, 0.87, 1.0])
    return exit_code("look_ahead", lambda: compare(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
