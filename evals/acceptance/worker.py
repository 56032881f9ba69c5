"""The worker of the acceptance command: one process that runs every step on one device.

`python -m qmix.evals.acceptance.worker [--rehearse] [--fail STEP=HOW] FD` reads the names of steps
from stdin, and writes messages to the descriptor FD. What steps share, a model above all, stays in
memory from one to the next. Knows nothing of time.
"""

import argparse
import gc
import json
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

import torch

from qmix.evals.acceptance.process import end_with_parent
from qmix.evals.acceptance.step import Step, step_named
from qmix.evals.steps.setting import NotHereError, Setting

Result = dict[str, object]

_PACKAGES = ("triton", "numpy", "bitsandbytes", "gptqmodel")


def machine(device: torch.device) -> dict[str, object]:
    """What a record says of GPU and versions."""
    gpu: dict[str, object] = {"gpu": None}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        gpu = {
            "gpu": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
        }
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in _PACKAGES},
    }
    return {**gpu, "versions": versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Server:
    """Runs the steps that it is asked for, in a setting.

    Args:
        fault: the name of a step and how it fails, in a rehearsal: raise, hang or die.
    """

    def __init__(self, setting: Setting, replies: TextIO, fault: tuple[str, str] | None) -> None:
        self._setting, self._replies, self._fault = setting, replies, fault

    def serve(self, requests: TextIO) -> None:
        """Answer requests until there are no more, or the device is lost."""
        self._send({"machine": machine(self._setting.device)})
        for line in requests:
            if not self._run(step_named(line.strip())):
                return

    def _run(self, step: Step) -> bool:
        """Run a step to its end; whether the device is still there."""
        end: Result = {"end": "ok", "error": None, "fatal": False}
        results: list[Result] = []
        try:
            if step.needs_gpu and not self._setting.can_launch:
                raise NotHereError("no CUDA device")
            for result in self._results(step):
                results.append(result)
                self._send({"result": result})
        except NotHereError as reason:
            end |= {"end": "skipped", "error": str(reason)}
        except Exception as error:  # noqa: BLE001 - whatever it is, the record must state it
            fatal = _is_device_lost(error)
            end |= {"end": "failed", "error": _told(error), "fatal": fatal}
        else:
            failed = [result["failed"] for result in results if "failed" in result]
            if failed:
                what = f"{len(failed)} of {len(results)}: {failed[0]}"
                end |= {"end": "failed", "error": what, "fatal": _is_device_lost(what)}
        if not end["fatal"]:
            gc.collect()
            if self._setting.device.type == "cuda":
                torch.cuda.empty_cache()
        self._send(end)
        return not end["fatal"]

    def _results(self, step: Step) -> Iterator[Result]:
        module = import_module(f"qmix.evals.steps.{step.module}")
        results: Iterator[Result] = module.results(self._setting, **step.arguments)
        yield next(results)
        if self._fault is not None and self._fault[0] == step.name:
            _fail(self._fault[1])
        yield from results

    def _send(self, message: Result) -> None:
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()


def _fail(how: str) -> None:
    """What may become of a step in the middle of it."""
    if how == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered (rehearsed)")
    if how == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    threading.Event().wait()


def _told(error: Exception) -> str:
    """The traceback, and a last line that says what happened."""
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    trace = "".join(traceback.format_exception(error))[-6000:]
    return f"{trace.strip()}\n{what}"


def _is_device_lost(error: object) -> bool:
    """Whether nothing works in this process any more: CUDA's errors stay."""
    return "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.acceptance.worker")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--fail", metavar="STEP=HOW")
    parser.add_argument("descriptor", type=int)
    options = parser.parse_args(arguments)
    end_with_parent()
    name, _, how = (options.fail or "").partition("=")
    if options.rehearse:
        from qmix.evals.acceptance import interpreted_codes  # needs triton, which a worker may lack

        interpreted_codes.install()
    with os.fdopen(options.descriptor, "w", encoding="utf-8") as replies, torch.no_grad():
        setting = Setting.rehearsed() if options.rehearse else Setting.real()
        Server(setting, replies, (name, how) if options.fail else None).serve(sys.stdin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
