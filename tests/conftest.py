"""Small checkpoints built from a seed; no download, no device index, no path of anybody's."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from qmix.config import MixtralConfig
from qmix.models.causal_lm import MixtralForCausalLM

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "evals" / "tiny"
SHARED = ROOT.parent / "shared"

os.environ.pop("QMIX_DEBUG", None)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def small_config(**changes):
    """Three layers, eight experts, widths that make blocks straddle rows (96 is no multiple of 64)."""
    values = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    return MixtralConfig(**{**values, **changes})


def small_model(**changes):
    torch.manual_seed(0)
    return MixtralForCausalLM(small_config(**changes)).eval()


@contextmanager
def threads(count):
    """Torch's threads within the block: sums of many threads are added in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
