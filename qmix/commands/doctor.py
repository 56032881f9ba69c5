"""`qmix doctor`: what this machine has, what will be slow or fail on it, and what to do about that.

Looks, and with `--measure` times; changes nothing but the user's file of measurements.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from qmix.planning import gpus as cards
from qmix.planning import machine
from qmix.planning.byte_sizes import show
from qmix.planning.machine import Gpu, Measured

State = Literal["ok", "slow", "fails", "note"]

_PACKAGES = ("numpy", "sentencepiece", "triton", "transformers", "flash_attn", "matplotlib")
_LEAST_TORCH, _NEXT_TORCH = (2, 9), (2, 14)
_PICKLES_TORCH = (2, 10)
# The 8x7B in 4 bits: what its files take, and its 16-bit source.
_CHECKPOINT_BYTES, _LEAST_RAM = 25 << 30, 3 << 30
_COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: what was looked at, what is there, and, unless all is well, the remedy."""

    what: str
    found: str
    state: State = "ok"
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings, and what was measured, now or before."""

    findings: tuple[Finding, ...]
    measured: Measured | None = None
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
        marks = {"ok": " ", "note": " ", "slow": "!", "fails": "x"}
        lines = []
        for one in self.findings:
            lines.append(f"{marks[one.state]} {one.what:12} {one.found}")
            if one.remedy:
                lines.append(f"  {'':12} -> {one.remedy}")
        if self.measured is not None:
            lines += ["", *_measured_lines(self.measured)]
        if self.saved is not None:
            lines.append(f"saved in {self.saved}, where qmix plan finds it")
        return "\n".join(lines) + "\n"


def examine(
    folder: Path,
    *,
    measure: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Report:
    """Look at the machine, and at the disk below `folder`.

    Args:
        measure: time memory, disk, device and PCIe, and save it for plans (a few seconds).
    """
    gpus = machine.gpus()
    key = machine.key(gpus[0].name if gpus else None)
    findings = [
        *_software(),
        *_processor(),
        *_memory(),
        *_disk(folder),
        *_devices(gpus),
        *_packages(),
    ]
    if measure:
        measured = _measure(key, folder, cuda=_torch_sees_cuda(), progress=progress)
        path, saved = machine.measurements_path(), None
        try:
            saved = machine.save(measured, path)
        except OSError as error:
            findings.append(
                Finding(
                    what="measurements",
                    found=f"{path} cannot be written: {error.strerror}",
                    state="note",
                    remedy="Set XDG_CACHE_HOME to a directory of yours.",
                )
            )
        return Report(findings=tuple(findings), measured=measured, saved=saved)
    before = machine.measurements(key)
    if before.trouble is not None:
        findings.append(Finding(what="measurements", found=before.trouble, state="note"))
    elif before.measured is None:
        findings.append(
            Finding(
                what="measurements",
                found="none of this machine",
                state="note",
                remedy="qmix doctor --measure takes them; until then plans use tables.",
            )
        )
    return Report(findings=tuple(findings), measured=before.measured)


def _software() -> Iterator[Finding]:
    import qmix

    yield Finding(what="qmix", found=qmix.__version__)
    yield Finding(what="python", found=f"{platform.python_version()}, {sys.platform}")
    version = _version("torch")
    if version is None:
        yield Finding(
            what="torch",
            found="missing",
            state="fails",
            remedy="Install it; qmix plan, inspect and --help work without.",
        )
        return
    numbers = _numbers(version)
    if not _LEAST_TORCH <= numbers < _NEXT_TORCH:
        yield Finding(
            what="torch",
            found=version,
            state="note",
            remedy="Tested are 2.9 to 2.13; another version may fail.",
        )
    elif numbers < _PICKLES_TORCH:
        yield Finding(
            what="torch",
            found=version,
            state="note",
            remedy="qmix convert reads pickles with 2.10 or newer only (CVE-2026-24747).",
        )
    else:
        yield Finding(what="torch", found=version)


def _processor() -> Iterator[Finding]:
    model, extensions = machine.processor()
    found = f"{model}, {machine.cores()} cores, {' '.join(extensions) or 'no vector extensions'}"
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in extensions:
        yield Finding(
            what="processor",
            found=found,
            state="slow",
            remedy="4-bit products on the CPU want AVX2; torch's are taken instead.",
        )
    else:
        yield Finding(what="processor", found=found)
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        yield Finding(
            what="compiler",
            found="none",
            state="slow",
            remedy="Install g++ or clang++: the CPU's 4-bit kernels are compiled at first use.",
        )
    else:
        yield Finding(what="compiler", found=compiler)


def _memory() -> Iterator[Finding]:
    memory = machine.memory()
    found = f"{show(memory.available)} free of {show(memory.total)}"
    if memory.limit == "cgroup":
        found += " (limited by a control group)"
    if memory.available < _LEAST_RAM:
        yield Finding(
            what="host memory",
            found=found,
            state="fails",
            remedy="An 8x7B in 4 bits wants 3 GiB at the very least; close other programs.",
        )
    elif memory.available < _CHECKPOINT_BYTES:
        yield Finding(
            what="host memory",
            found=found,
            state="note",
            remedy="An 8x7B in 4 bits does not fit as a whole: without a GPU experts are read from "
            "the disk (--ram).",
        )
    else:
        yield Finding(what="host memory", found=found)


def _disk(folder: Path) -> Iterator[Finding]:
    free = machine.disk_free(folder)
    found = f"{show(free)} free in {folder.resolve()}"
    if free < _CHECKPOINT_BYTES:
        yield Finding(
            what="disk",
            found=found,
            state="note",
            remedy="An 8x7B in 4 bits takes 24 GB, its 16-bit source 93 GB.",
        )
    else:
        yield Finding(what="disk", found=found)


def _devices(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    if not gpus:
        yield Finding(
            what="GPU",
            found="none that nvidia-smi shows",
            state="note",
            remedy="Models run on the CPU; qmix plan DIR --card 3090 plans for a card.",
        )
    for gpu in gpus:
        capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
        found = (
            f"{gpu.name}, {show(gpu.free)} free of {show(gpu.total)}, compute capability "
            f"{capability}, driver {gpu.driver}"
        )
        if gpu.capability < cards.LEAST_CAPABILITY:
            yield Finding(
                what="GPU",
                found=found,
                state="slow",
                remedy="The 4-bit kernels need compute capability 8.0; weights are dequantized before "
                "every product.",
            )
        else:
            yield Finding(what="GPU", found=found)
    if gpus and not _torch_sees_cuda():
        yield Finding(
            what="CUDA",
            found="this torch sees no GPU",
            state="fails",
            remedy="Install a torch built for CUDA, or a newer driver.",
        )


def _packages() -> Iterator[Finding]:
    found = [f"{name} {version}" for name in _PACKAGES if (version := _version(name))]
    missing = [name for name in _PACKAGES if _version(name) is None]
    yield Finding(what="packages", found=", ".join(found) or "none")
    if missing:
        yield Finding(what="optional", found=f"not installed: {', '.join(missing)}", state="note")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int(part) for part in parts if part.isdecimal())


def _torch_sees_cuda() -> bool:
    if _version("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _measure(
    key: str, folder: Path, *, cuda: bool, progress: Callable[[str, int, int], None]
) -> Measured:
    import torch

    from qmix.evals.timing import bandwidth

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
    return Measured(
        key=key,
        host_read=host,
        disk_read=disk,
        device_copy=device,
        interconnect=interconnect,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _measured_lines(measured: Measured) -> Iterator[str]:
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
