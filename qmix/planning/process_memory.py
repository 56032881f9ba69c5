"""The resident memory of this process, as Linux reports it. Knows nothing of budgets."""

from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """Memory that is resident now, in bytes; None where the system does not tell."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most memory that was ever resident, in bytes; None where the system does not tell.

    Mapped file pages count, the page cache does not.
    """
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(sizes[0]) if sizes else None
