"""`qmix doctor`: what this machine has, how to mend what it lacks and, with --measure, its speed.

Changes nothing but the user's file of measurements, and the caches of compiled kernels. The checks
are in qmix.commands.diagnosis; heavy imports stay inside the functions.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmix.commands import options, terminal
from qmix.printable import escaped

if TYPE_CHECKING:
    from qmix.commands.diagnosis import Finding
    from qmix.planning.machine import Measured

_MARKS = {"ok": " ", "note": " ", "slow": "!", "fails": "x"}


def doctor(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Time memory, disk and GPU, and save that for plans."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check this machine: what would be slow or fail, and the remedy.

    Examples:
      qmix doctor
      qmix doctor --measure
    """
    with terminal.progress() as show:
        report = examine(Path.cwd(), measure=measure, progress=show)
    terminal.print_result(report.text(), report.to_dict(), as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """All findings, and what was measured, now or before.

    Attributes:
        saved: the file that the measurements of this run were saved in.
    """

    findings: tuple["Finding", ...]
    measured: "Measured | None" = None
    saved: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "measured": None if self.measured is None else asdict(self.measured),
            "saved": None if self.saved is None else str(self.saved),
        }

    def text(self) -> str:
        """For a person to read, and to paste."""
        lines = []
        for finding in self.findings:
            lines.append(f"{_MARKS[finding.state]} {finding.what:12} {finding.found}")
            if finding.remedy:
                lines.append(f"  {'':12} -> {finding.remedy}")
        if self.measured is not None:
            lines += ["", *_measured_lines(self.measured)]
        if self.saved is not None:
            lines.append(f"saved in {self.saved}, where qmix plan finds it")
        return "\n".join(map(escaped, lines)) + "\n"


def examine(
    folder: Path,
    *,
    measure: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> DoctorReport:
    """Look at the machine, and at the disk below `folder`.

    Args:
        measure: time memory, disk, device and PCIe, and save it for plans (a few seconds).
    """
    from qmix.commands.diagnosis import Facts, Finding, diagnose
    from qmix.commands.tuning_findings import tunings
    from qmix.planning import machine

    facts = Facts.gather(folder)
    findings = (*diagnose(facts), *tunings(facts))
    key = machine.key(facts.gpus[0].name if facts.gpus else None)
    if measure:
        measured = _measure(key, folder, cuda=facts.torch_sees_cuda, progress=progress)
        try:
            return DoctorReport(findings=findings, measured=measured, saved=machine.save(measured))
        except OSError as error:
            unsaved = Finding(
                what="measurements",
                found=f"{machine.measurements_path()} cannot be written: {error.strerror}",
                state="note",
                remedy="Set XDG_CACHE_HOME to a directory that you can write to.",
            )
            return DoctorReport(findings=(*findings, unsaved), measured=measured)
    before = machine.measurements(key)
    if before.trouble is not None:
        findings += (Finding(what="measurements", found=before.trouble, state="note"),)
    elif before.measured is None:
        findings += (
            Finding(
                what="measurements",
                found="none of this machine",
                state="note",
                remedy="qmix doctor --measure takes them; until then plans use tables.",
            ),
        )
    return DoctorReport(findings=findings, measured=before.measured)


def _measure(
    key: str, folder: Path, *, cuda: bool, progress: Callable[[str, int, int], None]
) -> "Measured":
    from datetime import UTC, datetime

    import torch

    from qmix.evals.timing import bandwidth
    from qmix.planning import machine

    steps = 4 if cuda else 2
    progress("host memory", 0, steps)
    host = bandwidth.read_bandwidth(torch.device("cpu"))
    progress("disk", 1, steps)
    disk: float | None = None
    if machine.disk_free(folder) > 2 << 30 and os.access(folder, os.W_OK):
        disk = bandwidth.disk_bandwidth(folder)
    device = interconnect = None
    if cuda:
        progress("device memory", 2, steps)
        device = bandwidth.copy_bandwidth(torch.device("cuda"))
        progress("PCIe", 3, steps)
        interconnect = bandwidth.interconnect_bandwidth(torch.device("cuda"))
    return machine.Measured(
        key=key,
        host_read=host,
        disk_read=disk,
        device_copy=device,
        interconnect=interconnect,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _measured_lines(measured: "Measured") -> Iterator[str]:
    rows = (
        ("host memory", measured.host_read, "read by all threads"),
        ("disk", measured.disk_read, "read, not cached"),
        ("GPU memory", measured.device_copy, "copied, both directions counted"),
        ("PCIe", measured.interconnect, "pinned host memory to the GPU"),
    )
    for what, rate, how in rows:
        if rate is not None:
            yield f"  {what:12} {rate / 1e9:.3g} GB/s {how}"
    yield f"  measured     {measured.date}"
