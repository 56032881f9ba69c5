"""What a GPU's clocks, power and temperature were while a step ran, as nvidia-smi says them.

A figure means little without its clock: a card that is hot or shared is slower. Knows no step.
"""

import shutil
import statistics
import subprocess
import threading
from collections.abc import Callable

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
_NAMES = ("sm_mhz", "memory_mhz", "watts", "celsius")
_INTERVAL_SECONDS = 1.0

Sample = tuple[float, ...]


def query() -> Sample | None:
    """The values of FIELDS of the first GPU; None if nvidia-smi does not say them."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return tuple(float(part) for part in done.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


class ClockLog:
    """Samples in a thread, until it is closed or there is nothing to sample."""

    def __init__(self, sample: Callable[[], Sample | None] = query) -> None:
        self._sample, self._samples = sample, list[Sample]()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def taken(self) -> dict[str, dict[str, float]]:
        """Median and largest value of each field since the last call; empty without samples."""
        samples, self._samples = self._samples, []
        return {
            name: {"median": statistics.median(values), "largest": max(values)}
            for name, values in zip(_NAMES, zip(*samples, strict=True), strict=False)
        }

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            sample = self._sample()
            if sample is None:
                return
            self._samples.append(sample)
            if self._closed.wait(_INTERVAL_SECONDS):
                return
