"""results.jsonl: what happened, a line each, in the file before the next thing happens.

A command that is ended at any moment leaves all lines but perhaps a part of the last one.
Knows nothing of how a step runs.
"""

import json
from pathlib import Path
from typing import Any

from qmix.evals.acceptance.record import StepOutcome

FILE = "results.jsonl"

Line = dict[str, Any]


class Journal:
    """The lines of a folder; earlier ones are kept, and read when it is opened.

    Attributes:
        machine: what the last worker said of GPU, driver and versions; empty before that.
        outcomes: of each step that has begun, by name. A step that was begun and not ended has the
            status "interrupted".
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self.machine: dict[str, Any] = {}
        self.outcomes: dict[str, StepOutcome] = {}
        for line in _lines(self.path):
            self._take(line)
        if self.is_in(folder) and not self.path.read_bytes().endswith(b"\n"):
            self._append("\n")  # after a line that was cut short

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a folder has a journal."""
        return (folder / FILE).is_file()

    def add(self, line: Line) -> None:
        """Write a line, at once."""
        self._append(json.dumps(line) + "\n")
        self._take(line)

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _take(self, line: Line) -> None:
        name = line.get("step")
        if "machine" in line:
            self.machine = line["machine"]
        elif name is None:
            return
        elif "result" in line:
            self.outcomes[name].results.append(line["result"])
        elif "clocks" in line:
            self.outcomes[name].clocks = line["clocks"]
        elif "end" in line:
            outcome = self.outcomes[name]
            outcome.status, outcome.seconds = line["end"], line["seconds"]
            outcome.error = line.get("error")
        else:
            self.outcomes[name] = StepOutcome("interrupted", error="the command was ended")


def _lines(path: Path) -> list[Line]:
    """The lines of a journal, without one that was cut short."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines.append(line)
    return lines
