"""Other packages whose bytes and values are ours: bitsandbytes, without compiling."""

from importlib.util import find_spec
from unittest import mock

import pytest
import torch

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install bitsandbytes",
)


def _uncompiled(function=None, **_):
    return function if function is not None else _uncompiled


def eager_bitsandbytes():
    """The package, or a skip where it is not installed.

    It compiles four of its functions by torch.compile, which takes a minute of a process and must
    change nothing: the oracle is what their code says.
    """
    with mock.patch.object(torch, "compile", _uncompiled):
        pytest.importorskip("bitsandbytes.functional")
        return pytest.importorskip("bitsandbytes")
