"""What a process may do with a model: after a fork, and while a CUDA graph is captured.

Knows no model.
"""

import os

import torch
from torch import Tensor

from qmix.errors import UnsupportedError


def capturing(values: Tensor) -> bool:
    """Whether the caller captures a CUDA graph, so that values on a GPU cannot be looked at."""
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


class MadeHere:
    """Remembers the process in which it was made, copied or unpickled."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def check(self, device: torch.device) -> None:
        """Raise in a forked child that would wait forever, or whose GPU does not answer.

        Torch's threads stay in the parent, and the child's torch waits for them once it wants more
        than one. CUDA does not work after a fork at all.

        Raises:
            UnsupportedError: this is another process, on a GPU or with several threads.
        """
        if os.getpid() == self._process:
            return
        if device.type == "cuda":
            raise UnsupportedError(
                "a model on a GPU does not work in a forked process",
                remedy="Load the model in the child, and start the child with spawn.",
            )
        if torch.get_num_threads() > 1:
            raise UnsupportedError(
                "a forked process would wait for threads that stay in its parent",
                where="torch.get_num_threads()",
                expected="1 in a forked process",
                found=torch.get_num_threads(),
                remedy="Call torch.set_num_threads(1) in the child, or start it with spawn.",
            )

    def __reduce__(self) -> tuple[object, ...]:
        """A copy belongs to the process that makes it."""
        return MadeHere, ()
