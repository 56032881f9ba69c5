"""The same command in several processes of this machine, by torch's own launcher.

A process that is lost ends the others, and the run, by its name. Knows nothing of what is run.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from qmix.errors import CTRL_C, QmixError
from qmix.processes.group import LostPeerError

_SHOWN = 2000  # characters of a lost process's last words


class EndedError(Exception):
    """A process said itself what is wrong.

    Attributes:
        exit_code: its.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def without_option(arguments: Sequence[str], option: str) -> list[str]:
    """A command line without an option that takes a value, in either of its spellings."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith(f"{option}="):
            skip = False
        elif argument == option:
            skip = True
        else:
            kept.append(argument)
    return kept


def launch(arguments: Sequence[str], processes: int, *, kept: str) -> None:
    """Run `python -m qmix.cli ARGUMENTS` in several processes; the first one prints.

    Args:
        kept: what is said of a lost run's finished work.

    Raises:
        EndedError: the first process ended with an error, and has said why, or by a signal.
        QmixError: another one was lost; the error names it.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its report of a lost process is ours.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="qmix",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(
                log_dir=logs, redirects=dict.fromkeys(range(1, processes), Std.ALL)
            ),
        )
        config.signals_to_handle = "SIGTERM,SIGHUP,SIGQUIT"  # releases before 2.10 take Ctrl-C too
        try:
            with _ctrl_c_left_to_them():
                elastic_launch(config, sys.executable)("-m", "qmix.cli", *arguments)
        except SignalException as error:
            raise EndedError(128 + error.sigval) from None
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            rank = first_lost(codes)
            if (rank == 0 and codes[rank] > 0) or codes[rank] == CTRL_C:
                raise EndedError(codes[rank]) from None
            raise _lost(rank, codes[rank], processes, Path(logs), kept) from None


def first_lost(codes: Mapping[int, int]) -> int:
    """Which of the processes that ended, with their exit codes, made the others end."""
    others = [rank for rank, code in codes.items() if code != LostPeerError.exit_code]
    return min(others or codes)


@contextmanager
def _ctrl_c_left_to_them() -> Iterator[None]:
    """A terminal's Ctrl-C reaches every process: those that compute say how they end."""
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lost(rank: int, code: int, processes: int, logs: Path, kept: str) -> QmixError:
    how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    words = [path.read_text(errors="replace") for path in logs.rglob(f"{rank}/stderr.log")]
    said = "".join(words).strip().rpartition("\n")[2][-_SHOWN:]
    return QmixError(
        f"process {rank} of {processes} was lost",
        found=f"{how}{f': {said}' if said else ''}",
        remedy=kept,
    )
