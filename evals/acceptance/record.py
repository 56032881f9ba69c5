"""The record of the GPU acceptance command: a JSON document, and the same as tables in markdown.

Knows nothing of how a step runs.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qmix import strict_json
from qmix.evals import markdown
from qmix.files import atomic_file

Status = Literal["ok", "failed", "timeout", "skipped", "interrupted"]


@dataclass
class StepOutcome:
    """How a step ended: its results up to that point, and the error that ended it early.

    Attributes:
        clocks: of the GPU meanwhile, see qmix.evals.acceptance.clocks.
    """

    status: Status
    seconds: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    clocks: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class AcceptanceRecord:
    """The document that is written anew after every step.

    Attributes:
        budget: in seconds.
        machine: what the worker says of the GPU and of versions.
    """

    command: str
    date: str
    gpu: str | None
    driver: str | None
    versions: dict[str, str | None]
    revision: str | None
    budget: float
    machine: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, StepOutcome] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write DATE-GPU-acceptance.json and .md, each in one step; returns the first path."""
        gpu = re.sub(r"[^a-z0-9]+", "-", (self.gpu or "no-gpu").lower()).strip("-")
        path = folder / f"{self.date[:10]}-{gpu}-acceptance.json"
        strict_json.write(path, asdict(self), indent=1)
        atomic_file.write(path.with_suffix(".md"), self.markdown().encode())
        return path

    def markdown(self) -> str:
        """What was measured, as a table for each step."""
        versions = ", ".join(f"{name} {value}" for name, value in self.versions.items() if value)
        parts = [
            f"# {self.gpu or 'No GPU'}, {self.date[:10]}\n",
            f"`{self.command}`; revision {self.revision or 'unknown'}; driver {self.driver or '-'}; "
            f"{versions}\n",
        ]
        for name, outcome in self.steps.items():
            parts.append(f"## {name}: {outcome.status}, {outcome.seconds:.0f} s\n")
            parts.append(_table(outcome.results))
            if outcome.clocks:
                parts.append(_clocks(outcome.clocks))
            if outcome.error:
                last = outcome.error.strip().splitlines()[-1]
                parts.append(f"{outcome.status}: {last}\n")
        return "\n".join(parts)


def _clocks(clocks: dict[str, dict[str, float]]) -> str:
    shown = (f"{name} {each['median']:g} ({each['largest']:g})" for name, each in clocks.items())
    return f"median (largest): {', '.join(shown)}\n"


def _table(results: Sequence[dict[str, Any]]) -> str:
    """A markdown table of all short values; text of several lines stays in the record."""
    names: dict[str, None] = {}
    for result in results:
        for name, value in result.items():
            if isinstance(value, (str, int, float)) and "\n" not in str(value):
                names[name] = None
    if not names:
        return "no results\n"
    return markdown.table(
        list(names), [[_cell(result.get(name)) for name in names] for result in results]
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    text = "" if value is None or isinstance(value, (list, dict)) else str(value)
    return "" if "\n" in text else text.replace("|", "/")
