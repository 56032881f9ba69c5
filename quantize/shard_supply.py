"""Reading a source whose files come and go: in which order, and which must be there at a time.

Knows nothing of where the files come from, or of how a weight is rounded.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qmix.formats import Checkpoint
from qmix.quantize.output_checkpoint import OutputTensor

_FEW = 2  # a layer may lie in two files


class ShardSupply(Protocol):
    """Brings the files of a source whose headers alone are there, and takes them away again."""

    def put(self, name: str) -> None:
        """Put a file in its place, by its name."""

    def take_out(self, name: str) -> None:
        """Let go of it."""

    def check_space(self, names: Iterable[str], out: Path, out_bytes: int) -> None:
        """Raise ResourceError unless the disk holds these files at once, beside `out`."""


@dataclass(frozen=True)
class Visit:
    """A tensor, the files that are opened for it, and those that no later tensor needs."""

    output: OutputTensor
    opened: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()


def in_few_files(checkpoint: Checkpoint, outputs: Sequence[OutputTensor]) -> list[Visit]:
    """The tensors in their order if two files at once are enough for that, else file by file."""
    files = {
        output.tensor.name: tuple(
            sorted({checkpoint.entry(name).file.name for name in checkpoint.stored(output.tensor)})
        )
        for output in outputs
    }
    visits = _visits(outputs, files)
    if len(most_files(visits)) <= _FEW:
        return visits
    return _visits(sorted(outputs, key=lambda output: files[output.tensor.name]), files)


def most_files(visits: Sequence[Visit]) -> tuple[str, ...]:
    """The files that must be there at once, where they are most."""
    present: set[str] = set()
    most: set[str] = set()
    for visit in visits:
        present |= set(visit.opened)
        most = max(most, set(present), key=len)
        present -= set(visit.closed)
    return tuple(sorted(most))


def _visits(outputs: Sequence[OutputTensor], files: dict[str, tuple[str, ...]]) -> list[Visit]:
    names = [files[output.tensor.name] for output in outputs]
    first = {file: at for at in reversed(range(len(names))) for file in names[at]}
    last = {file: at for at in range(len(names)) for file in names[at]}
    return [
        Visit(
            output,
            opened=tuple(file for file in names[at] if first[file] == at),
            closed=tuple(file for file in names[at] if last[file] == at),
        )
        for at, output in enumerate(outputs)
    ]
