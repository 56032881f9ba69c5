"""The acceptance command's setting in a rehearsal, for tests of its steps."""

import os
from unittest import mock

from qmix.evals.steps.setting import Setting


def rehearsal():
    """Kernels of ours run in it only where Triton was imported with TRITON_INTERPRET=1."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        return Setting.rehearsed()
