"""A group of processes whose members are threads of this one."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from qmix.processes.group import Group


def together(*members):
    """Call each member with its `Group`, all at once, and return what they return, in order."""
    barrier, given = threading.Barrier(len(members)), [[] for _ in members]

    def run(rank):
        torch.set_num_threads(1)

        def exchange(items):
            given[rank] = items
            barrier.wait()
            found = [item for each in given for item in each]
            barrier.wait()
            return found

        try:
            return members[rank](Group(rank, len(members), exchange))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(members)) as pool:
        futures = [pool.submit(run, rank) for rank in range(len(members))]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
