"""The side of a worker process: limits on time and memory, questions on stdin, answers on stdout.

Run by worker_process.py, with the names of a program. A message is 4 bytes of length, then JSON.
Imports nothing of qmix.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, BinaryIO


def serve(source: BinaryIO, sink: BinaryIO, program: Mapping[str, Any]) -> None:
    """Answer questions until there are no more.

    Args:
        program: `answer`, and its limits for each question, CPU_SECONDS and MEMORY_BYTES.
    """
    again = _limit(program["CPU_SECONDS"], program["MEMORY_BYTES"])
    while len(head := source.read(4)) == 4:
        again()
        (size,) = struct.unpack("<I", head)
        reply = json.dumps(program["answer"](json.loads(source.read(size)))).encode()
        sink.write(struct.pack("<I", len(reply)) + reply)
        sink.flush()


def _limit(cpu_seconds: int, memory_bytes: int) -> Callable[[], None]:
    """Set the limits of this process; returns what gives each question its seconds anew."""
    try:
        import resource
    except ImportError:  # another system: who asks waits no longer than its own limit
        return lambda: None
    for kind, most in (("AS", memory_bytes), ("FSIZE", 0), ("CORE", 0)):
        with suppress(ValueError, OSError):  # a lower limit stands already, or there is none
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)

    def again() -> None:
        seconds = int(sum(os.times()[:2])) + cpu_seconds
        soft = seconds if hard == resource.RLIM_INFINITY else min(seconds, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))

    return again
