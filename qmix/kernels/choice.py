"""Which backend a model is loaded for: the one that was asked for, or the best that is right.

A backend that was named and cannot run is an error. Otherwise they are tried in order, each by
small matrices of the model's own kinds, and one warning says why the first was passed over. On the
CPU our kernels need no trial: where there is no compiler torch takes their place, as ever.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qmix import instruction_sets
from qmix.errors import QmixError, UnsupportedError
from qmix.kernels import bnb
from qmix.kernels.backend import BACKENDS, Backend, named
from qmix.kernels.cpu.library import library
from qmix.kernels.gpu import probe
from qmix.weights.scheme import Scheme

# What `survey` asks for: the two kinds of weights that qmix writes.
_USUAL = (Scheme(kind="nf4"), Scheme(kind="int4"))


@dataclass(frozen=True)
class Verdict:
    """What would multiply on a device.

    Attributes:
        device: its name.
        backend: None: the one that the environment names cannot run.
        refusal: why no better backend is taken; None if this is the best, or the named one.
    """

    device: str
    backend: Backend | None
    refusal: QmixError | None = None


def survey() -> tuple[Verdict, ...]:
    """The verdict for the CPU and for each GPU that torch sees, for the weights that qmix writes.

    What ends a load, such as a variable that names no backend, is the verdict's refusal.
    """
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return tuple(map(_verdict, devices))


def _verdict(device: torch.device) -> Verdict:
    name = str(device)
    if device.type == "cuda":
        name += f", {torch.cuda.get_device_name(device)}"
    try:
        return _of_device(device, name)
    except QmixError as error:
        return Verdict(name, None, error)


def _of_device(device: torch.device, name: str) -> Verdict:
    asked, first = named(None), None
    for backend in BACKENDS if asked is None else (asked,):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the verdict says it
            error = why_not(backend, device, torch.bfloat16, _USUAL)
        if error is None:
            return Verdict(name, backend, first)
        first = first or error
        if device.type == "cpu":
            return Verdict(name, None if asked else "torch", first)
    return Verdict(name, None, first)


def choose(
    asked: Backend | None, device: torch.device, dtype: torch.dtype, schemes: Iterable[Scheme]
) -> Backend:
    """The backend of a model.

    Args:
        asked: the one that was named; None leaves the choice.
        dtype: of activations.
        schemes: of the weights that are to be multiplied.

    Raises:
        QmixError: why the named one cannot run.
    """
    schemes = tuple(schemes)
    if asked is not None:
        error = why_not(asked, device, dtype, schemes)
        if error is not None:
            raise error
        return asked
    if device.type == "cpu":
        return "qmix"
    errors: list[QmixError] = []
    for backend in BACKENDS:
        error = why_not(backend, device, dtype, schemes)
        if error is None:
            break
        errors.append(error)
    if errors:
        warnings.warn(f"slower than it could be, with {backend}: {errors[0]}", stacklevel=2)
    return backend


def why_not(
    backend: Backend, device: torch.device, dtype: torch.dtype, schemes: Iterable[Scheme]
) -> QmixError | None:
    """Why a backend cannot multiply such weights on a device; None: it can.

    Raises:
        UsageError: `QMIX_CPU_PATH` names no instruction set.
        ResourceError: the device does not answer.
    """
    if backend == "torch":
        return None
    if backend == "bitsandbytes":
        return bnb.why_not(device, dtype, schemes)
    if device.type == "cuda":
        return probe.why_not(device, dtype, schemes)
    if library().isa is not None:
        return None
    return UnsupportedError(
        "there are no compiled kernels",
        where="backend",
        expected="a C++ compiler, and an instruction set in "
        f"{instruction_sets.VARIABLE} unless it is empty",
        remedy=f"Install g++ or clang++, or unset {instruction_sets.VARIABLE}.",
    )
