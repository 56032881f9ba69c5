"""What the GPU kernels cost when they were last compiled ahead of time, by version of Triton.

evals/records/aot.json holds a line for each kernel. `python -m qmix.evals.aot --write` replaces the
lines of the Triton that is installed. Compiles nothing, and needs no triton.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmix.evals import markdown

if TYPE_CHECKING:
    from qmix.evals.timing.machine_code import KernelCost

_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
_KINDS = {"nf4 64": "NF4", "int4 128": "Int4", "int3 128": "Int3", "int2 128 g64": "Int2 g64"}
PATH = Path(__file__).parent / "records" / "aot.json"


@dataclass(frozen=True)
class Recorded:
    """A kernel's line: see `evals.timing.machine_code.KernelCost`."""

    registers: int
    stack: int
    shared: int
    loop: int
    per_weight: float
    exchanges: int
    matrix_instruction: str


def of(cost: "KernelCost") -> Recorded:
    """The line of a kernel that was compiled."""
    return Recorded(
        cost.registers,
        cost.stack,
        cost.shared,
        cost.loop,
        round(cost.per_weight, 3),
        cost.exchanges,
        cost.matrix_instruction,
    )


def recorded(version: str) -> Mapping[str, Recorded]:
    """The lines of a Triton version by kernel; none if it was never recorded."""
    return {name: Recorded(*line) for name, line in _read().get(version, {}).items()}


def versions() -> list[str]:
    """The Triton versions that have lines."""
    return list(_read())


def worse(cost: "KernelCost", before: Recorded | None) -> Iterator[str]:
    """In what a kernel has got worse. Registers may grow within the eight of an allocation."""
    if before is None:
        return
    now = of(cost)
    for name in ("stack", "shared", "loop", "exchanges"):
        if getattr(now, name) > getattr(before, name):
            yield f"{name} {getattr(now, name)}, was {getattr(before, name)}"
    if -(-now.registers // 8) > -(-before.registers // 8):
        yield f"registers {now.registers}, were {before.registers}"
    if now.matrix_instruction != before.matrix_instruction:
        yield f"{now.matrix_instruction or 'no matrix instruction'}, was {before.matrix_instruction}"


def table() -> str:
    """Of what a decode step launches, the worst of each architecture: cost a weight, registers."""
    rows = []
    for version in versions():
        worst: dict[tuple[str, str], tuple[float, int]] = {}
        for name, line in recorded(version).items():
            arch, rest = name.split(" ", 1)
            if "8 columns, 2 warps" not in rest or "sorted" in rest or " own " in rest:
                continue
            kind = next((kind for form, kind in _KINDS.items() if f" {form}," in rest), "")
            cost, registers = worst.get((arch, kind), (0.0, 0))
            worst[arch, kind] = max(cost, line.per_weight), max(registers, line.registers)
        for kind in _KINDS.values():
            cells = [worst.get((arch, kind)) for arch in _ARCHS]
            if any(cells):
                shown = ("-" if each is None else f"{each[0]:.2f} ({each[1]})" for each in cells)
                rows.append((f"{kind}, Triton {version}", *shown))
    return markdown.table(("instructions a weight (registers)", *_ARCHS), rows)


def write(version: str, lines: Mapping[str, Recorded]) -> None:
    """Replace the lines of these kernels and this version; the others stay."""
    record = _read()
    kept = record.get(version, {})
    record[version] = kept | {name: list(astuple(line)) for name, line in lines.items()}
    PATH.write_text(_text(record), encoding="utf-8")


def _read() -> dict[str, dict[str, list[Any]]]:
    if not PATH.exists():
        return {}
    record: dict[str, dict[str, list[Any]]] = json.loads(PATH.read_text(encoding="utf-8"))
    return record


def _text(record: Mapping[str, Mapping[str, list[Any]]]) -> str:
    """JSON with a line for each kernel, so that a change shows as one."""
    parts = []
    for version in sorted(record):
        lines = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(line)}"
            for name, line in sorted(record[version].items())
        )
        parts.append(f"{json.dumps(version)}: {{\n{lines}\n}}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
