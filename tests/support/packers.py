"""Packers of the integer layouts in plain Python, code by code: the readers' oracles.

Written from the formulas of the layouts' own projects, without qmix's formats.
"""

import json
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

from qmix import MixtralForCausalLM
from qmix.formats import open_checkpoint
from qmix.weights.dense import Dense
from qmix.weights.scheme import DENSE
from tests.support.models import small_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# The linear layers of a small Mixtral.
LAYERS, EXPERTS = 3, 4
ATTENTION = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(LAYERS) for x in "qkvo"]
ROUTERS = [f"model.layers.{i}.block_sparse_moe.gate" for i in range(LAYERS)]
MATRICES = [
    f"model.layers.{i}.block_sparse_moe.experts.{e}.w{n}"
    for i in range(LAYERS)
    for e in range(EXPERTS)
    for n in (1, 2, 3)
]
MODULES = [*ATTENTION, *ROUTERS, *MATRICES, "lm_head"]


def uniform(scheme, *, attention=None):
    """Experts in `scheme`, the attention too unless it is given, the rest dense."""
    chosen = dict.fromkeys(MODULES, DENSE) | dict.fromkeys(MATRICES, scheme)
    return chosen | dict.fromkeys(ATTENTION, attention or scheme)


@dataclass(frozen=True)
class Plain:
    """One quantized weight: codes [N][K], zeros [N][G] and groups [K] as lists, scales [N, G]."""

    codes: list
    zeros: list
    groups: list
    scales: torch.Tensor
    bits: int = 4

    @property
    def shape(self):
        return len(self.codes), len(self.groups)

    def meant(self):
        """float32 [N, K]: (code - zero) * scale."""
        index = torch.tensor(self.groups)
        difference = torch.tensor(self.codes) - torch.tensor(self.zeros)[:, index]
        return difference.float() * self.scales.float()[:, index]


def plain(
    shape,
    group,
    *,
    bits=4,
    symmetric=True,
    act_order=False,
    low=1,
    seed=0,
    dtype=torch.float16,
):
    """A random weight of that shape; group -1 is one group. Zeros from `low` to 15 or 255."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    size = columns if group == -1 else group
    count = columns // size
    groups = torch.arange(columns) // size
    if act_order:
        groups = groups[torch.randperm(columns, generator=generator)]
    zeros = torch.randint(low, 1 << bits, (rows, count), generator=generator)
    return Plain(
        codes=torch.randint(0, 1 << bits, shape, generator=generator).tolist(),
        zeros=[[1 << bits - 1] * count] * rows if symmetric else zeros.tolist(),
        groups=groups.tolist(),
        scales=(torch.rand(rows, count, generator=generator) / 100 + 0.001).to(dtype),
        bits=bits,
    )


def word(codes):
    """Eight codes (or four of 8 bits) as a signed 32-bit integer, the first in the lowest bits."""
    bits, value = 32 // len(codes), 0
    for code in reversed(codes):
        value = value << bits | code
    return signed(value)


def signed(value):
    value %= 1 << 32
    return value - (1 << 32) if value >> 31 else value


def gptq(weight, prefix, *, version=1):
    """AutoGPTQ's tensors; v1 subtracts one from each code of a word at once, as gptqmodel."""
    rows, columns = weight.shape
    each = 32 // weight.bits
    less = (0x11111111 if weight.bits == 4 else 0x01010101) if version == 1 else 0
    qweight = [
        [word(weight.codes[n][k : k + each]) for n in range(rows)] for k in range(0, columns, each)
    ]
    qzeros = [
        [
            signed(word([weight.zeros[n + i][g] for i in range(each)]) - less)
            for n in range(0, rows, each)
        ]
        for g in range(len(weight.zeros[0]))
    ]
    return {
        f"{prefix}.qweight": torch.tensor(qweight, dtype=torch.int32),
        f"{prefix}.qzeros": torch.tensor(qzeros, dtype=torch.int32),
        f"{prefix}.scales": weight.scales.T.contiguous(),
        f"{prefix}.g_idx": torch.tensor(weight.groups, dtype=torch.int32),
    }


def awq(weight, prefix):
    """AutoAWQ's tensors of its "gemm" version."""
    rows, columns = weight.shape

    def outputs(column):
        return [word([column[n + i] for i in AWQ_ORDER]) for n in range(0, rows, 8)]

    qweight = [outputs([weight.codes[n][k] for n in range(rows)]) for k in range(columns)]
    qzeros = [
        outputs([weight.zeros[n][g] for n in range(rows)]) for g in range(len(weight.zeros[0]))
    ]
    return {
        f"{prefix}.qweight": torch.tensor(qweight, dtype=torch.int32),
        f"{prefix}.qzeros": torch.tensor(qzeros, dtype=torch.int32),
        f"{prefix}.scales": weight.scales.T.contiguous(),
    }


def compressed(weight, prefix, *, symmetric=True):
    """compressed-tensors' tensors in its "pack-quantized" format."""
    rows, columns = weight.shape
    each = 32 // weight.bits
    packed = [[word(row[k : k + each]) for k in range(0, columns, each)] for row in weight.codes]
    tensors = {
        f"{prefix}.weight_packed": torch.tensor(packed, dtype=torch.int32),
        f"{prefix}.weight_scale": weight.scales,
        f"{prefix}.weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        half = [1 << weight.bits - 1] * len(weight.zeros[0])
        padded = [*weight.zeros, *[half] * (-rows % each)]
        points = [
            [word([padded[n + i][g] for i in range(each)]) for g in range(len(padded[0]))]
            for n in range(0, rows, each)
        ]
        tensors[f"{prefix}.weight_zero_point"] = torch.tensor(points, dtype=torch.int32)
    return tensors


def checkpoint(
    folder,
    pack,
    quantization,
    *,
    group=32,
    experts=4,
    dense=("gate", "lm_head"),
    own=lambda prefix: {},
    **options,
):
    """Write a small Mixtral with every linear layer packed by `pack(weight, prefix)`.

    `own(prefix)` are the options of one module, before `options`. Returns the model of the same
    values in float32.
    """
    model = small_model(intermediate_size=128, num_hidden_layers=2, num_local_experts=experts)
    tensors = {}
    for name, value in list(model.state_dict().items()):
        prefix = name.removesuffix(".weight")
        if value.dim() == 1 or prefix.endswith((*dense, "embed_tokens")):
            tensors[name] = value.clone()
            continue
        chosen = {"group": group, **options, **own(prefix)}
        weight = plain(tuple(value.shape), seed=len(tensors), **chosen)
        tensors |= pack(weight, prefix)
        with torch.no_grad():
            value.copy_(weight.meant())
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    document = model.config.to_dict()
    if quantization is not None:
        document["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(document))
    return model


IDS = torch.tensor([[5, 6, 7, 99, 3]])


def logits(folder):
    """What a checkpoint says to IDS, in float32."""
    model = MixtralForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        return model(input_ids=IDS).logits


def dense_values(folder):
    """All tensors of a checkpoint in float32, by name."""
    opened = open_checkpoint(folder)
    return {tensor.name: opened.dense(tensor).float() for tensor in opened.tensors}


def equal(first, second):
    """Assert that two directories hold the same weights to the bit; return schemes by module."""
    ours, theirs = open_checkpoint(first), open_checkpoint(second)
    schemes = {}
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        assert a == b
        if not a.linear:
            assert torch.equal(ours.read(a.name), theirs.read(a.name))
            continue
        one, other = ours.weight(a), theirs.weight(a)
        schemes[a.prefix] = one.scheme
        assert one.scheme == other.scheme, a.prefix
        assert one.dtype == other.dtype
        assert torch.equal(one.dequantize(torch.float32), other.dequantize(torch.float32)), a.prefix
        if not isinstance(one, Dense):
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.scales, other.scales)
            assert (one.perm is None) == (other.perm is None)
    return schemes


GPTQ = {"bits": 4, "group_size": 32, "sym": True, "quant_method": "gptq"}
AWQ = {"quant_method": "awq", "version": "gemm"}
CT = {"quant_method": "compressed-tensors"}
MIXED = {
    "dynamic": {r".*\.self_attn\..*": {"bits": 8, "group_size": 64}, r".*\.o_proj": {"bits": 8}}
}


def own(prefix):
    return {"bits": 8, "group": 64} if "self_attn" in prefix else {}


SOURCES = {
    "gptq": (gptq, GPTQ, {}),
    "gptq v2": (
        lambda w, p: gptq(w, p, version=2),
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        {},
    ),
    "gptq per output": (gptq, {**GPTQ, "group_size": -1}, {"group": -1}),
    "gptq 8 bits": (gptq, {**GPTQ, "bits": 8}, {"bits": 8}),
    "gptq mixed": (gptq, {**GPTQ, **MIXED}, {"own": own}),
    "gptq bfloat16 scales": (gptq, GPTQ, {"dtype": torch.bfloat16}),
    "gptq dense attention": (gptq, GPTQ, {"dense": ("gate", "lm_head", "_proj")}),
    "awq symmetric": (awq, AWQ, {}),
    "compressed": (compressed, CT, {}),
}
ASYMMETRIC = {
    "gptq asymmetric": (gptq, {**GPTQ, "sym": False}, {"symmetric": False}),
    "awq": (awq, AWQ, {"symmetric": False}),
    "gptq act-order": (gptq, {**GPTQ, "desc_act": True}, {"act_order": True}),
}


def write(folder, name):
    pack, settings, options = (SOURCES | ASYMMETRIC)[name]
    checkpoint(folder, pack, settings, **options)
    (folder / "tokenizer.model").write_bytes(b"any")
