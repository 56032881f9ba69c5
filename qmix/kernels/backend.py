"""Whose code multiplies: the names of the backends, and the one that calls of a block take.

`qmix` is the code of this package, compiled or Triton's. `bitsandbytes` is the package of that
name, for the weights that it takes, and torch for all else. `torch` dequantizes a tile of a weight
and multiplies it. `reference` is the oracle of tests. All of them compute the same.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

from qmix.errors import UsageError

Backend = Literal["qmix", "bitsandbytes", "torch"]

BACKENDS: tuple[Backend, ...] = get_args(Backend)  # the order in which they are tried
AUTO = "auto"
VARIABLE = "QMIX_BACKEND"

_current: ContextVar[Backend | Literal["reference"]] = ContextVar("backend", default="qmix")


def named(name: str | None) -> Backend | None:
    """The backend of a name, or else the one that the environment names; None for `auto`.

    Raises:
        UsageError: there is no such backend.
    """
    where = "backend"
    if name is None:
        name, where = os.environ.get(VARIABLE) or AUTO, VARIABLE
    if name == AUTO:
        return None
    for backend in BACKENDS:
        if backend == name:
            return backend
    raise UsageError(
        "no such backend",
        where=where,
        expected=", ".join((AUTO, *BACKENDS)),
        found=repr(name)[:80],
    )


@contextmanager
def override(backend: Backend | Literal["reference"]) -> Iterator[None]:
    """Use the named backend for every call within the block; `reference` is the oracle.

    Raises:
        UsageError: no such backend.
    """
    if backend not in (*BACKENDS, "reference"):
        raise UsageError(
            "no such backend",
            expected=", ".join((*BACKENDS, "reference")),
            found=repr(backend)[:80],
        )
    token = _current.set(backend)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def preferred(backend: Backend) -> Iterator[None]:
    """Use a model's own backend within the block, unless `override` is in force around it."""
    if backend == "qmix" or overridden():
        yield
        return
    with override(backend):
        yield


def current() -> Backend | Literal["reference"]:
    """The backend of this block."""
    return _current.get()


def overridden() -> bool:
    """Whether other code than that of this package is in force."""
    return _current.get() != "qmix"
