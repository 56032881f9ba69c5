"""Other packages whose bytes and values are ours: bitsandbytes, without compiling."""

from unittest import mock

import pytest
import torch


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
