"""The real kernels over an offloaded model's address table, in Triton's interpreter or on a GPU.

Run by tests/experts/test_gpu_store.py in a process of its own. Residency must not change a bit: the
same kernels read the same bytes at other addresses.
"""

import pytest
import torch

from qmix import kernels
from qmix.experts.policy import PRESETS
from qmix.generation.packed_layers import supported
from qmix.generation.static_decoder import StaticDecoder
from qmix.kernels.gpu import packed_matmul
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.offload import Tiers
from tests.support.interpreter import CONVERSIONS, DEVICE, INTERPRETED, skip_without_a_device
from tests.support.models import load_in_tiers, quantized, small_model

skip_without_a_device()
pytestmark = CONVERSIONS

EXPERTS = 2 * 4
PROMPT = torch.arange(3, 22)[None]  # more than a step's 16 tokens


@pytest.fixture(autouse=True)
def on_the_cpu_too(monkeypatch):
    monkeypatch.setitem(kernels._LINEAR, (kernels.PackedWeight, "cpu"), packed_matmul.linear)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    widths = {"hidden_size": 128, "intermediate_size": 64, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    model = small_model(**widths, **heads, num_hidden_layers=2)
    model.half().save_pretrained(root / "dense")
    return quantized(root / "dense", root / "nf4")


def loaded(directory, slots, name="heat"):
    """Through the loader, as on a GPU, experts of all layers in slots where none is asked for."""
    slots = EXPERTS if slots is None else slots
    tiers = Tiers(device=slots, host=EXPERTS, settings=PRESETS[name])
    model = load_in_tiers(directory, DEVICE, tiers=tiers)
    assert supported(model.model)
    return model


def tokens(model, count=2):
    """A prompt by streaming, then steps by the recorded launches: all logits."""
    cache = model.new_cache(1, 64)
    with torch.no_grad():
        found = [
            model.lm_head(
                model.model.decode(model.model.embed(PROMPT.to(DEVICE)), cache=cache).hidden
            )
        ]
    step = StaticDecoder(model.model, model.lm_head, cache)
    for token in range(count):
        found.append(step.step(torch.tensor([5 + token], device=DEVICE)).clone())
        cache.advance(1)
    return found


@pytest.mark.parametrize(
    ("slots", "name"), [(3, "heat"), pytest.param(4, "lru", marks=pytest.mark.soak)]
)
def test_steps_and_prompts_are_equal_bits_whatever_has_a_slot(directory, slots, name):
    expected = tokens(loaded(directory, None))
    assert all(torch.isfinite(logits).all() for logits in expected)
    model = loaded(directory, slots, name)
    for _ in range(2):
        for found, logits in zip(tokens(model), expected, strict=True):
            assert torch.equal(found, logits)
    did = model.store.statistics()
    assert did.tokens >= 3  # the last is counted when the next begins
    assert did.hits + did.misses == did.tokens * 2 * 2
    assert did.path == "zero-copy"
    assert did.disk == 0


def test_a_step_is_recorded_only_while_it_needs_nothing_from_the_host(directory, monkeypatch):
    monkeypatch.setattr("qmix.generation.static_decoders._on_gpu", lambda weight: True)
    model = loaded(directory, 3)
    cache = model.new_cache(1, 8)
    with torch.no_grad():
        assert model.static_decoders.for_cache(model.model, model.lm_head, cache, None) is not None
        model.store.path.current = "cpu"
        assert model.static_decoders.for_cache(model.model, model.lm_head, cache, None) is None


def test_what_fits_neither_memory_is_read_packed_and_fetched(directory):
    """With fewer blobs on the host than experts no step is recorded; each expert needs a slot."""
    prompt = PROMPT.to(DEVICE)
    with torch.no_grad():
        expected = loaded(directory, None)(prompt[:, :5]).logits
        model = load_in_tiers(directory, DEVICE, tiers=Tiers(device=4, host=5))
        assert not model.store.recordable
        assert not supported(model.model)
        assert torch.equal(model(prompt[:, :5]).logits, expected)
    assert model.store.statistics().disk == 3


def test_saving_writes_what_was_read(directory, tmp_path):
    model = load_in_tiers(directory, DEVICE, tiers=Tiers(device=4, host=5))
    model.save_pretrained(tmp_path / "again")
    plain = MixtralForCausalLM.from_pretrained(directory, device="cpu")
    plain.save_pretrained(tmp_path / "plain")
    for path in sorted((tmp_path / "plain").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: pinned memory, streams and a recorded graph")
def test_on_a_gpu_the_host_is_pinned_and_the_step_recorded(directory):
    model = loaded(directory, 3)
    assert model.store.statistics().unpinned_bytes == 0
    assert model.store.recordable
    expected = model.generate(PROMPT, max_new_tokens=12)
    assert torch.equal(loaded(directory, None).generate(PROMPT, max_new_tokens=12), expected)
