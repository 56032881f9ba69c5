"""Fixtures of every test, and the environment in which all of them run.

Tests download nothing, name no device index, and touch no path outside the checkout but ../shared.
They and their children see a new home, and run on one thread unless they ask for more.

Torch is not imported at the top: the controller of several workers needs none, and the number of
threads must be set before.
"""

import gc
import os
import shutil
import warnings

import pytest

from tests.support import environment, soak


def pytest_configure(config):
    if environment.entered() and not hasattr(config, "workerinput"):
        return  # a pytest that a test started
    if not hasattr(config, "workerinput"):
        soak.begin()
    home = environment.enter()
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items):
    soak.leave_to_soak(items)


def pytest_collection_finish():
    """Leave what collection made out of all later collections of garbage.

    It is 600,000 objects, and a full collection, of which tests and qmix ask for many, looks at
    each of them: half a second every time.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    if soak.is_over():
        pytest.skip("the minutes of this soak are over")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


def pytest_terminal_summary(terminalreporter):
    reports = [report for group in terminalreporter.stats.values() for report in group]
    line = soak.line([report for report in reports if getattr(report, "when", None) == "call"])
    if line is not None:
        terminalreporter.write_line(line)


@pytest.fixture
def counted(record_property):
    """Adds what a campaign counts to the line at the end: name=how many."""

    def count(**counts):
        outcomes = {name.replace("_", " "): number for name, number in counts.items()}
        record_property("counted", outcomes)

    return count


@pytest.fixture(scope="session", autouse=True)
def _cpu_kernels(pytestconfig):
    """Compile the CPU kernels once for all workers and sessions; without a compiler do without."""
    from qmix.kernels.cpu.build import COMPILERS
    from qmix.kernels.cpu.library import library

    cache = getattr(pytestconfig, "cache", None)
    with warnings.catch_warnings():
        if not any(map(shutil.which, COMPILERS)):
            warnings.simplefilter("ignore")
        if cache is None:
            library()
        else:
            environment.keep_compiled(cache.mkdir("kernels"), library)


@pytest.fixture
def one_thread():
    from tests.support.models import threads

    with threads(1):
        yield


@pytest.fixture
def two_threads():
    from tests.support.models import threads

    with threads(2):
        yield


@pytest.fixture
def model():
    from tests.support.models import small_model

    return small_model()


@pytest.fixture(scope="session")
def tiny():
    """The trained tiny Mixtral of the checkout."""
    from tests.support.models import TINY

    return TINY


@pytest.fixture(scope="session")
def tiny_nf4(tmp_path_factory, tiny):
    """The tiny Mixtral in 4 bits, quantized once a session."""
    from tests.support.models import quantized

    return quantized(tiny, tmp_path_factory.mktemp("nf4") / "tiny-nf4")


@pytest.fixture(scope="session")
def shared():
    """Texts beside the checkout; the project runs without them."""
    from tests.support.models import SHARED

    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return SHARED / "data"


@pytest.fixture(params=("torch", "portable", "neon", "i8mm", "avx2", "avx_vnni", "avx512", "vnni"))
def isa(request, monkeypatch, two_threads):
    """Each instruction set that this processor has; the library is looked up before and after."""
    from qmix.instruction_sets import TORCH, VARIABLE
    from qmix.kernels.cpu.library import library
    from tests.support.cpu_kernels import available

    if request.param not in (TORCH, *available()):
        pytest.skip(f"no {request.param} on this processor, or no compiler")
    with monkeypatch.context() as patched:
        patched.setenv(VARIABLE, request.param)
        library.cache_clear()
        yield request.param
    library.cache_clear()  # now, or a thread that is at work still would keep what was asked for


@pytest.fixture
def compiled(two_threads):
    """The compiled kernels, or a skip."""
    from tests.support.cpu_kernels import available

    if not available():
        pytest.skip("no compiler")


@pytest.fixture
def poison():
    """Fresh tensors are filled with NaN, so that what a kernel forgets to write shows."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the oracle's
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports inductor
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def small_checkpoint(tmp_path):
    """A small bfloat16 checkpoint with the tiny model's tokenizer, of the test's own."""
    from tests.support.models import write_dense

    return write_dense(tmp_path / "source", num_hidden_layers=1)


@pytest.fixture
def small_checkpoint_nf4(small_checkpoint, tmp_path):
    """The same in 4 bits."""
    from tests.support.models import quantized

    return quantized(small_checkpoint, tmp_path / "packed")


@pytest.fixture(scope="session")
def _hub_server():
    from tests.support import fake_hub

    with fake_hub.serving() as hub:
        yield hub


@pytest.fixture
def hub(_hub_server, tmp_path, monkeypatch):
    """An empty hub on loopback, which this process sees with an empty cache."""
    from tests.support import fake_hub

    _hub_server.reset()
    with fake_hub.seen_by_this_process(_hub_server, tmp_path / "home", monkeypatch):
        yield _hub_server


@pytest.fixture
def org_tiny(hub, tiny):
    """The hub with the tiny Mixtral as org/tiny, four times over in other layouts."""
    from tests.support.fake_hub import BIG

    others = ("consolidated.00.pth", "original/model.safetensors", "pytorch_model.bin", "tiny.gguf")
    hub.add("org/tiny", tiny, **dict.fromkeys(others, BIG))
    return hub
