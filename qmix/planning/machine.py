"""The machine that this process runs on: memory, processor, disk and GPUs, and their measurements.

Reads the system's files and runs nvidia-smi; knows no torch. `qmix doctor --measure` writes the
measurements, and plans read them.
"""

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError, QmixError
from qmix.files import user_files

FILE = "machine.json"
_VERSION = 1
_CGROUP = Path("/sys/fs/cgroup")
_NODES = Path("/sys/devices/system/node")
_UNLIMITED = 1 << 60  # cgroup v1 writes the largest page count where there is no limit
_NVIDIA_SMI_S = 10
_CACHE_USE = 0.75  # of the memory that is free: others want some, too


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Host memory in bytes, within the limits of control groups.

    Attributes:
        total: what this process may use at most. available: what it may use now, without swapping.
        limit: what limits it, "system" or "cgroup".
    """

    total: int
    available: int
    limit: str = "system"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its driver names it; sizes in bytes, `free` at this moment."""

    name: str
    total: int
    free: int
    driver: str
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What `qmix doctor --measure` timed, in bytes a second; None if there is nothing to time.

    Attributes:
        key: the machine and its GPU, see `key`.
        host_read: host memory, read by all threads.
        disk_read: the file system that was measured, not cached.
        device_copy: device memory; bytes read and bytes written both count.
        interconnect: pinned host memory to the device.
        date: ISO 8601.
    """

    key: str
    host_read: float
    disk_read: float | None = None
    device_copy: float | None = None
    interconnect: float | None = None
    date: str = ""


def memory(proc: Path = Path("/proc"), cgroup: Path = _CGROUP) -> HostMemory:
    """What the system and its control groups leave to this process; page cache is available."""
    host = _system(proc)
    for limit, used in _cgroups(proc, cgroup):
        if limit < host.total:
            available = max(0, min(host.available, limit - used))
            host = HostMemory(total=limit, available=available, limit="cgroup")
        elif limit - used < host.available:
            host = HostMemory(total=host.total, available=max(0, limit - used), limit="cgroup")
    return host


def cache_room(*, beside: int) -> int:
    """Bytes that the page cache may be asked to keep.

    A cache that is too small for what passes through it holds nothing when it is asked again.

    Args:
        beside: bytes that the process is going to take.
    """
    return int(_CACHE_USE * max(0, memory().available - beside))


def _system(proc: Path) -> HostMemory:
    lines: dict[str, int] = {}
    with suppress(OSError, ValueError, IndexError):
        for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            lines[name] = int(value.split()[0]) * 1024
    if "MemTotal" in lines:
        total = lines["MemTotal"]
        return HostMemory(
            total=total, available=lines.get("MemAvailable", lines.get("MemFree", total))
        )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return HostMemory(total=total, available=total)


def _cgroups(proc: Path, root: Path) -> list[tuple[int, int]]:
    """(limit, used) of every control group that contains this process, versions 2 and 1."""
    groups = []
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            names = ("memory.max", "memory.current", "inactive_file")
            base = root
            if controllers:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                base = root / "memory"
            # Inside a container the path may be the host's; then the root's own files apply.
            for folder in {base, *_upward(base, path)}:
                with suppress(OSError, ValueError):
                    limit = int((folder / names[0]).read_text())  # "max" is no number
                    used = int((folder / names[1]).read_text())
                    if limit < _UNLIMITED:
                        groups.append((limit, max(0, used - _inactive(folder, names[2]))))
    return groups


def _upward(base: Path, path: str) -> list[Path]:
    folder, folders = base / path.strip("/"), []
    while folder != base and base in folder.parents:
        folders.append(folder)
        folder = folder.parent
    return folders


def _inactive(folder: Path, name: str) -> int:
    """Bytes of cached files in a group's memory, which are dropped before anything is refused."""
    with suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def numa_nodes(root: Path = _NODES, cpus: Collection[int] | None = None) -> tuple[int, ...]:
    """The NUMA nodes that have memory and processors which this process may run on.

    Empty where the system does not say. Fields: kernel.org/doc/Documentation/ABI/stable/
    sysfs-devices-node.

    Args:
        cpus: those that it may run on; None asks the system.
    """
    if cpus is None:
        cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    nodes = []
    with suppress(OSError, ValueError):
        with_memory = _listed((root / "has_memory").read_text(encoding="ascii"))
        for node in sorted(with_memory):
            own = _listed((root / f"node{node}" / "cpulist").read_text(encoding="ascii"))
            if not own.isdisjoint(cpus):
                nodes.append(node)
    return tuple(nodes)


def _listed(text: str) -> set[int]:
    """The numbers of a list such as 0-3,8."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def gpus(run: Callable[..., Any] = subprocess.run) -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that this process may use, according to nvidia-smi; none without it."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = "name,memory.total,memory.free,driver_version,compute_cap"
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        done = run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_S,
            check=True,
        )
        every = tuple(_gpu(line) for line in done.stdout.splitlines() if line.strip())
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return every
        chosen = [part.strip() for part in visible.split(",")]
        return tuple(every[int(i)] for i in chosen if i.isdecimal() and int(i) < len(every))
    return ()


def _gpu(line: str) -> Gpu:
    name, total, free, driver, capability = (part.strip() for part in line.rsplit(",", 4))
    major, _, minor = capability.partition(".")
    return Gpu(
        name=name,
        total=int(total) << 20,
        free=int(free) << 20,
        driver=driver,
        capability=(int(major), int(minor or 0)),
    )


def processor() -> str:
    """The CPU's model."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """The number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def disk_free(folder: Path) -> int:
    """Bytes that can be written below a directory."""
    return shutil.disk_usage(folder).free


def key(gpu: str | None = None) -> str:
    """What measurements are stored by: host name, CPU, cores and GPU."""
    model = processor()
    return " / ".join((socket.gethostname(), model, f"{cores()} cores", gpu or "no GPU"))


def measurements_path() -> Path:
    """The user's file of measurements: machine.json in qmix's cache directory."""
    return user_files.cache_directory() / FILE


@dataclass(frozen=True)
class SavedMeasurements:
    """The measurements of this machine; `trouble` says why an existing file was ignored."""

    measured: Measured | None = None
    trouble: str | None = None


def measurements(key: str, path: Path | None = None) -> SavedMeasurements:
    """What was saved by a key (see `key`); a damaged file is reported and ignored."""
    path = path or measurements_path()
    if not os.path.lexists(path):
        return SavedMeasurements()
    try:
        entries = _entries(path)
        return SavedMeasurements(next((entry for entry in entries if entry.key == key), None))
    except QmixError as error:
        return SavedMeasurements(trouble=f"{error} (ignored)")


def save(measured: Measured, path: Path | None = None) -> Path:
    """Save the measurements of one machine in the user's file, beside those of others.

    Returns:
        the file.

    Raises:
        WriteError: it cannot be written; the old file is unchanged.
    """
    path = path or measurements_path()
    entries = user_files.with_entry(lambda: _entries(path), measured)
    document = {"version": _VERSION, "machines": [asdict(entry) for entry in entries]}
    user_files.prepare(path)
    strict_json.write(path, document, private=True)
    return path


def _entries(path: Path) -> list[Measured]:
    """All measurements of the file.

    Raises:
        CheckpointError: it is not a file of measurements, or others can have written it.
    """

    def refuse(found: object) -> CheckpointError:
        return CheckpointError(
            "not a file of measurements",
            where=str(path),
            found=repr(found)[:80],
            remedy="qmix doctor --measure writes it again.",
        )

    user_files.check(path)
    document = strict_json.read(path)
    machines = document.get("machines")
    if document.get("version") != _VERSION or not isinstance(machines, list):
        raise refuse(document)
    known = {field.name for field in fields(Measured)}
    measured = []
    for entry in machines:
        if (
            not isinstance(entry, dict)
            or not entry.keys() <= known
            or not {"key", "host_read"} <= entry.keys()
        ):
            raise refuse(entry)
        rates = [entry.get(n) for n in ("host_read", "disk_read", "device_copy", "interconnect")]
        positive = [type(rate) in (int, float) and rate > 0 for rate in rates if rate is not None]
        if (
            not all(positive)
            or rates[0] is None
            or not all(isinstance(entry.get(n, ""), str) for n in ("key", "date"))
        ):
            raise refuse(entry)
        measured.append(Measured(**entry))
    return measured
