"""Reading a checkpoint's weights as a load does, beside what its disk and memory can do.

`python -m qmix.evals.load_turns DIR [--turns 4] [--bytes 1GB] [--json FILE]`. The ways: `apart`,
each tensor for itself and through the page cache, as a load does where the cache has room for the
files; `past`, what lies together at once and past the cache, as it does elsewhere. Each turn reads
the first weights in each way, once with nothing of the files in the page cache and once with
everything, and beside each way reads as many bytes as `dd iflag=direct bs=4M` does, or copies as
many in memory. The buffers are those that a GPU's load would pin, so no new memory is taken: what
that costs is the system's own. Ratios are of speeds.
"""

import argparse
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmix.evals.command import exit_code
from qmix.evals.offload_turns import drop
from qmix.experts.arena import HostArena
from qmix.files import atomic_file
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files.spans import Together
from qmix.formats.names import ModelTensor
from qmix.models.read_ahead import Read, buffer_bytes, read_ahead
from qmix.planning import machine
from qmix.planning.budget import READ_AHEAD
from qmix.planning.byte_sizes import parse_size

WAYS = ("apart", "past")
_DD_BYTES = 4 << 20
_COPIED = 1 << 28  # more than a processor's caches hold


class HostUpload:
    """Buffers that are used in turn, and nothing that copies from them."""

    def __init__(self, nbytes: int) -> None:
        self._arena = HostArena([nbytes] * READ_AHEAD)
        for index in range(READ_AHEAD):
            self.buffer(index).fill_(1)  # the system gives the memory now

    def buffer(self, index: int) -> Tensor:
        """See Upload."""
        return self._arena.blob(index)

    def copied(self, index: int, tensors: Read) -> Read:
        """See Upload."""
        return tensors


@dataclass(frozen=True)
class Turn:
    """One way of reading, once.

    Attributes:
        ratio: its speed, of the disk's (cold) or of a copy in memory (warm) beside it.
        gigabytes_s: bytes a second, in 1e9. processor_s: of all threads, for 1e9 bytes.
    """

    way: str
    cold: bool
    ratio: float
    gigabytes_s: float
    processor_s: float


class Loads:
    """The first weights of a checkpoint, read again and again."""

    def __init__(self, directory: Path, nbytes: int) -> None:
        self.directory, self.checkpoint = directory, open_checkpoint(directory)
        self.tensors = _first(self.checkpoint, nbytes)
        self.nbytes = sum(map(self.checkpoint.stored_bytes, self.tensors))
        self._upload = HostUpload(buffer_bytes(self.checkpoint, self.tensors))
        self._source = torch.ones(min(_COPIED, self.nbytes), dtype=torch.uint8)
        self._target = torch.ones_like(self._source)

    def read(self, way: str) -> Read:
        """Read all weights in one way; the tensors of the last one."""
        last: Read = {}
        together = Together(past_cache=True) if way == "past" else None
        for _, read in read_ahead(self.checkpoint, self.tensors, together, self._upload):
            last = read
        return last

    def turn(self, way: str, *, cold: bool) -> Turn:
        """Read in one way, after what the disk or the memory can do has been timed."""
        drop(self.directory)
        if cold:
            beside = _timed(self._direct)[0]
        else:
            self.read("apart")
            beside = _timed(self._copy)[0]
        wall, processor = _timed(lambda: self.read(way))
        gigabytes = self.nbytes / 1e9
        return Turn(way, cold, beside / wall, gigabytes / wall, processor / gigabytes)

    def _direct(self) -> None:
        """What `dd` reads of the first weight's file, and of others until there is enough."""
        left = self.nbytes
        with mmap.mmap(-1, _DD_BYTES) as memory:
            for file in dict.fromkeys(map(self.checkpoint.file_of, self.tensors)):
                descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
                try:
                    for start in range(0, min(left, file.stat().st_size), _DD_BYTES):
                        left -= os.preadv(descriptor, [memory], start)
                finally:
                    os.close(descriptor)

    def _copy(self) -> None:
        for start in range(0, self.nbytes, _COPIED):
            part = slice(0, min(_COPIED, self.nbytes - start))
            self._target[part].copy_(self._source[part])


def turns(loads: Loads, number: int) -> Iterator[Turn]:
    """Every way, cold and warm, in another order each turn."""
    for turn in range(number):
        for cold in (True, False):
            for way in (*WAYS[turn % 2 :], *WAYS[: turn % 2]):
                yield loads.turn(way, cold=cold)


def compare(options: argparse.Namespace) -> None:
    """Print each way's medians, and keep every turn if a file is given."""
    loads = Loads(options.directory, parse_size(options.bytes, where="--bytes"))
    found: list[Turn] = []
    for turn in turns(loads, options.turns):
        found.append(turn)
        sys.stdout.write(_line([turn]))
        sys.stdout.flush()
    sys.stdout.write("medians:\n")
    for way, cold in dict.fromkeys((turn.way, turn.cold) for turn in found):
        sys.stdout.write(_line([t for t in found if (t.way, t.cold) == (way, cold)]))
    if options.json is not None:
        record = {
            "command": f"python -m qmix.evals.load_turns DIR --turns {options.turns} "
            f"--bytes {options.bytes}",
            "versions": {"torch": torch.__version__},
            "machine": {"cpu": machine.processor(), "load_average": os.getloadavg()[0]},
            "checkpoint": options.directory.resolve().name,
            "bytes": loads.nbytes,
            "turns": [asdict(turn) for turn in found],
        }
        data = json.dumps(record, indent=1) + "\n"
        atomic_file.write(options.json, data.encode())


def _first(checkpoint: Checkpoint, nbytes: int) -> Sequence[ModelTensor]:
    """The first weights, without the embedding, that have so many bytes together."""
    chosen: list[ModelTensor] = []
    for tensor in checkpoint.tensors:
        if tensor.kind != "embedding" and nbytes > 0:
            chosen.append(tensor)
            nbytes -= checkpoint.stored_bytes(tensor)
    return chosen


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and the processor's, of all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def _line(turns: Sequence[Turn]) -> str:
    """The medians of turns that were read in one way."""
    ratios = [turn.ratio for turn in turns]
    beside = "the disk's" if turns[0].cold else "a copy's"
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(turns) > 1 else ""
    speed = statistics.median(turn.gigabytes_s for turn in turns)
    processor = statistics.median(turn.processor_s for turn in turns)
    return (
        f"{'cold' if turns[0].cold else 'warm'} {turns[0].way:5}  "
        f"{statistics.median(ratios):.2f} of {beside} rate{spread}, {speed:.2f} GB/s, "
        f"{processor:.2f} s of the processor a GB\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.load_turns", description=__doc__)
    parser.add_argument("directory", type=Path, help="checkpoint directory")
    parser.add_argument("--turns", type=int, default=4, help="times each way is read (4)")
    parser.add_argument("--bytes", default="1GB", help="how much of the weights is read (1GB)")
    parser.add_argument("--json", type=Path, help="keep every turn in this file")
    options = parser.parse_args(arguments)
    return exit_code("load_turns", lambda: compare(options))


if __name__ == "__main__":
    sys.exit(main())
