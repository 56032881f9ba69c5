"""Traces of routing: which experts every token went through, as a small text file.

The first line is a JSON object, the header. Each further line is one token, with its layers
separated by spaces. A layer is the chosen experts' numbers within it, separated by commas; if the
header says so, each is followed by ":weight" (Q16, where 65536 is 1):

    {"format": "qmix-trace", "version": 1, "model": "", "layers": 3, "experts": 8, "chosen": 2,
     "gates": false, "expert_bytes": 0, "dense_bytes": 0}
    1,5 0,3 7,2

Knows nothing of models and slots.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Self

from qmix import strict_json
from qmix.errors import CheckpointError, UsageError
from qmix.files import regular_file
from qmix.quantities import counted

FORMAT, VERSION = "qmix-trace", 1

LayerExperts = tuple[int, ...]  # the chosen experts' numbers within a layer, or their gates
_TRACE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """What a trace was recorded from.

    Attributes:
        layers: number of layers of the model.
        experts: number of experts of a layer.
        chosen: number of experts that a token goes through in a layer.
        model: its name or fingerprint, for people.
        gates: whether the routing weights are recorded too.
        expert_bytes, dense_bytes: of one expert, and of everything else that a token reads; 0 if
            unknown.
    """

    layers: int
    experts: int
    chosen: int
    model: str = ""
    gates: bool = False
    expert_bytes: int = 0
    dense_bytes: int = 0


@dataclass(frozen=True)
class Trace:
    """A trace in memory: tokens x layers x chosen experts; gates in Q16 likewise, or empty."""

    header: TraceHeader
    tokens: tuple[tuple[LayerExperts, ...], ...]
    gates: tuple[tuple[LayerExperts, ...], ...] = ()

    def ids(self) -> Iterator[list[list[int]]]:
        """For each token and layer, the ids of the chosen experts, counted over all layers."""
        for token in self.tokens:
            yield [
                [layer * self.header.experts + expert for expert in experts]
                for layer, experts in enumerate(token)
            ]


class TraceRecorder:
    """Writes a trace, a line for each token. At any time only the last line can be incomplete.

    Raises:
        CheckpointError: the file cannot be written.
        UsageError: it exists.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self.header = header
        self._path = path
        try:
            self._file = path.open("x", encoding="ascii")
        except FileExistsError:
            raise UsageError(
                "the file exists", where=str(path), remedy="Remove it or choose another name."
            ) from None
        except OSError as error:
            raise self._write_error(error) from error
        self._line(json.dumps({"format": FORMAT, "version": VERSION, **asdict(header)}))

    def token(self, ids: Sequence[Sequence[int]], gates: Sequence[Sequence[int]] = ()) -> None:
        """Write a token: each layer's chosen experts by their numbers, and their Q16 weights."""
        assert len(ids) == self.header.layers, len(ids)
        assert all(len(experts) == self.header.chosen for experts in ids), ids
        assert bool(gates) == self.header.gates
        if gates:
            layers = [
                ",".join(f"{expert}:{gate}" for expert, gate in zip(*pair, strict=True))
                for pair in zip(ids, gates, strict=True)
            ]
        else:
            layers = [",".join(map(str, experts)) for experts in ids]
        self._line(" ".join(layers))

    def _line(self, text: str) -> None:
        try:
            self._file.write(text + "\n")
        except OSError as error:
            raise self._write_error(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trail: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError as failure:
            raise self._write_error(failure) from failure

    def _write_error(self, error: OSError) -> CheckpointError:
        return CheckpointError("cannot be written", where=str(self._path), found=error.strerror)


def read_trace(path: Path) -> Trace:
    """Read a whole trace.

    Raises:
        CheckpointError: not a trace, another version, or a damaged line, which is named.
    """
    content = regular_file.read(path, limit_bytes=_TRACE_BYTES)
    lines = content.decode("ascii", "replace").splitlines()
    header = _header(lines[0] if lines else "", str(path))
    tokens, gates = [], []
    for number, line in enumerate(lines[1:], 2):
        ids, weights = _token(line, header, f"{path}, line {number}")
        tokens.append(ids)
        gates.append(weights)
    if not tokens:
        raise CheckpointError("the trace has no tokens", where=str(path))
    return Trace(header, tuple(tokens), tuple(gates) if header.gates else ())


def _header(line: str, where: str) -> TraceHeader:
    try:
        document = strict_json.loads(line, where=where)
    except CheckpointError:
        document = {}
    kind = (document.pop("format", None), document.pop("version", None))
    if kind != (FORMAT, VERSION):
        raise CheckpointError(
            "not a trace",
            where=where,
            expected=f"{FORMAT} {VERSION} in the first line",
            found=f"{kind[0]} {kind[1]}"[:80] if kind[0] else line[:40] or "an empty file",
            remedy="`qmix trace record` makes one.",
        )
    types = {field.name: field.type for field in fields(TraceHeader)}
    for name, value in document.items():
        if types.get(name) is not type(value):
            raise CheckpointError(
                "wrong value in the header", where=f"{where}, {name}", found=value
            )
    for name in ("layers", "experts", "chosen"):
        if not 1 <= document.get(name, 0) <= 1 << 16:
            raise CheckpointError(
                "out of range", where=f"{where}, {name}", found=document.get(name, "nothing")
            )
    if min(document.get("expert_bytes", 0), document.get("dense_bytes", 0)) < 0:
        raise CheckpointError("negative size in the header", where=where)
    return TraceHeader(**document)


def _token(
    line: str, header: TraceHeader, where: str
) -> tuple[tuple[LayerExperts, ...], tuple[LayerExperts, ...]]:
    layers = line.split(" ")
    if len(layers) != header.layers:
        raise CheckpointError(
            "damaged", where=where, expected=counted(header.layers, "layer"), found=len(layers)
        )
    ids, gates = [], []
    for layer in layers:
        pairs = [part.split(":") for part in layer.split(",")]
        width = 2 if header.gates else 1
        well_formed = all(
            len(pair) == width and all(n.isascii() and n.isdigit() and len(n) < 10 for n in pair)
            for pair in pairs
        )
        numbers = tuple(int(pair[0]) for pair in pairs) if well_formed else ()
        if len(numbers) != header.chosen or len(set(numbers)) != header.chosen:
            raise CheckpointError(
                "damaged",
                where=where,
                expected=f"{header.chosen} different experts a layer",
                found=layer[:40],
            )
        if max(numbers) >= header.experts:
            raise CheckpointError(
                "damaged",
                where=where,
                expected=f"experts 0 to {header.experts - 1}",
                found=max(numbers),
            )
        ids.append(numbers)
        gates.append(tuple(int(pair[1]) for pair in pairs) if header.gates else ())
    return tuple(ids), tuple(gates)
