"""Bytes of every layout, from headers alone: those of the weights that loading makes of it."""

import copy
import warnings
from collections import Counter

import pytest
import torch

from qmix.errors import UnsupportedError
from qmix.evals import footprint as reality
from qmix.experts.reader import ExpertReader
from qmix.formats import open_checkpoint
from qmix.formats.metadata import read_metadata
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.pack import Packer
from qmix.nn.attention import Attention
from qmix.nn.moe import SparseMoeBlock
from qmix.planning.device_footprint import on_device
from qmix.planning.footprint import on_host
from qmix.planning.stored_model import StoredModel
from qmix.weights.blob import PAGE_BYTES
from qmix.weights.dense import Dense
from qmix.weights.packed.packed_shapes import matrix_format, padded
from qmix.weights.packed.planes import spec_of
from qmix.weights.packed.weight import PackedWeight
from tests.support.every_layout import EVERY


@pytest.fixture(scope="module", params=EVERY)
def source(request, tmp_path_factory):
    return EVERY[request.param](tmp_path_factory.mktemp("every") / "m")


@pytest.fixture(scope="module")
def planned_and_loaded(source):
    """(the model as planned from headers, the model)."""
    planned = StoredModel.of(read_metadata(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scales that are not used, FP8
        model = MixtralForCausalLM.from_pretrained(source, device="cpu")
    return planned, model


def weights_of(planned, model):
    """The loaded weights, in the order of the planned ones."""
    modules = dict(model.named_modules())
    found = (modules[stored.tensor.prefix] for stored in planned.weights)
    return [getattr(module, "stored", module.weight) for module in found]


def not_in_headers(stored, weight):
    """Bytes that a plan counts because only the data tell that they are not needed: of an order
    that is the identity, and of zeros that are all half of the range.
    """
    if not stored.scheme.integer:
        return 0
    order = 4 * stored.tensor.shape[1] if stored.scattered and weight.perm is None else 0
    return order + (0 if weight.symmetric == stored.scheme.symmetric else weight.scales.numel())


def test_bytes_of_each_weight_and_of_all(planned_and_loaded):
    model, loaded = planned_and_loaded[0], weights_of(*planned_and_loaded)
    unknown = 0
    for stored, weight in zip(model.weights, loaded, strict=True):
        expected = stored.nbytes(model.item) - not_in_headers(stored, weight)
        assert weight.nbytes == expected, stored
        unknown += not_in_headers(stored, weight)
    assert on_host(model).total - unknown == sum(map(own_bytes(loaded), loaded))


def own_bytes(weights):
    """Bytes of a weight's tensors, without the constants that several weights share."""
    uses = Counter(
        pointer for one in weights for pointer in {t.data_ptr() for t in reality._tensors(one)}
    )

    def count(weight):
        own = (t for t in reality._tensors(weight) if uses[t.data_ptr()] == 1)
        return sum(tensor.untyped_storage().nbytes() for tensor in own)

    return count


def test_schemes_and_packed_formats_of_each_weight(planned_and_loaded):
    model, loaded = planned_and_loaded[0], weights_of(*planned_and_loaded)
    for stored, weight in zip(model.weights, loaded, strict=True):
        if stored.scheme.kind == "dense" or not_in_headers(stored, weight):
            continue
        assert weight.scheme == stored.scheme
        assert packed_bytes(spec_of(weight)) == packed_bytes(stored.spec), stored


def packed_bytes(spec):
    spec = padded(spec)
    try:
        return matrix_format(spec).matrix_bytes(spec.shape)
    except UnsupportedError:
        return None


def test_bytes_in_the_packed_layout_and_beside_it(planned_and_loaded):
    """With CPU tensors as the device; what is not packed stays there in the standard layout."""
    planned, model = planned_and_loaded
    expected = on_device(planned)
    before = weights_of(planned, model)
    packed = copy.deepcopy(model)
    Packer().pack(packed)
    after = dict(zip(planned.weights, weights_of(planned, packed), strict=True))
    own = own_bytes([getattr(weight, "template", weight) for weight in after.values()])
    attentions = [module for module in packed.modules() if isinstance(module, Attention)]
    joined = {each.fused_qkv.matrix for each in attentions if each.fused_qkv is not None}
    found, kept = Counter(), 0
    found["attention"] += sum(matrix.blob.nbytes for matrix in joined)
    for (stored, weight), loaded in zip(after.items(), before, strict=True):
        unknown = not_in_headers(stored, loaded)
        if isinstance(weight, PackedWeight):
            kept += own(weight.template) + unknown
            by_itself = packed_bytes(stored.spec) if unknown else weight.matrix.blob.nbytes
            found[stored.tensor.kind] += 0 if shared(weight, joined) else by_itself
        else:
            found[stored.tensor.kind] += own(weight) + unknown
    for module in packed.modules():
        if isinstance(module, SparseMoeBlock) and module.stored.packed is not None:
            found["expert"] += sum(blob.nbytes for blob in module.stored.packed.table.blobs[0])
    if planned.config.tie_word_embeddings:
        found["head"] = found.pop("embedding")
    assert found.pop("expert") == expected.all_experts
    assert found == expected.kinds
    assert kept == expected.host_bytes


def shared(weight, joined):
    """Whether its bytes are among those of other matrices, which are counted as a whole."""
    return isinstance(weight.selection, str) or weight.matrix in joined


def test_every_expert_fits_the_blob_that_is_planned(source, planned_and_loaded):
    planned, model = planned_and_loaded
    checkpoint = open_checkpoint(source)
    loaded = dict(model.named_modules())

    def finish(weight, tensor):
        stored = loaded[tensor.prefix].stored
        assert torch.equal(weight.dequantize(model.dtype), stored.dequantize(model.dtype))
        return weight.to(stored.device) if not isinstance(weight, Dense) else stored

    reader = ExpertReader(checkpoint, model.dtype, finish)
    size = on_host(planned).blob
    assert 0 <= size - reader.blob_bytes < PAGE_BYTES
    for expert in range(len(reader)):
        reader.read(expert, torch.empty(reader.blob_bytes, dtype=torch.uint8))
