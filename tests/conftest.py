"""Fixtures of every test: no download, no device index, no path outside the checkout but ../shared."""

import os

import pytest
import torch

from qmix.kernels.cpu.library import ISAS, VARIABLE, library
from tests.support.cpu_kernels import BEST
from tests.support.models import SHARED, TINY, small_model, threads

os.environ.pop("QMIX_DEBUG", None)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def one_thread():
    with threads(1):
        yield


@pytest.fixture
def model():
    return small_model()


@pytest.fixture(scope="session")
def tiny():
    """The trained tiny Mixtral of the checkout."""
    return TINY


@pytest.fixture(scope="session")
def tiny_nf4(tmp_path_factory):
    """The tiny Mixtral in 4 bits, quantized once a session."""
    from qmix.quantize import streaming
    from qmix.weights.scheme import NF4, Recipe

    out = tmp_path_factory.mktemp("nf4") / "tiny-nf4"
    streaming.run(TINY, out, Recipe.uniform(NF4, attention=True), method="nf4")
    return out


@pytest.fixture(scope="session")
def shared():
    """Texts beside the checkout; the project runs without them."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return SHARED / "data"


@pytest.fixture(params=("torch", *ISAS))
def isa(request, monkeypatch):
    """Each instruction set that this processor has; the library is found anew for it, and after it."""
    if request.param in ISAS and ISAS.index(request.param) > BEST:
        pytest.skip(f"no {request.param} on this processor, or no compiler")
    monkeypatch.setenv(VARIABLE, request.param)
    library.cache_clear()
    yield request.param
    library.cache_clear()


@pytest.fixture
def poison():
    """Fresh tensors are filled with NaN, so that what a kernel forgets to write shows."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the oracle's
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
