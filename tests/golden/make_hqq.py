"""Write hqq-VERSION.safetensors beside this file: weights that hqq quantized and dequantized.

    python tests/golden/make_hqq.py          # in an environment with hqq
    python tests/golden/make_hqq.py mixtral  # a whole Mixtral

Kept as oracle: hqq 0.2.8 (torch 2.13 CPU) with transformers 4.47.1, whose experts are linear
layers: in version 5 they are one parameter, which hqq does not reach. Needs no qmix.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file

SHAPE = (16, 64)
CASES = {  # name: what the case adds to BaseQuantizeConfig, compute dtype
    "8bit": ({"nbits": 8, "group_size": 32}, torch.float16),
    "6bit": ({"nbits": 6, "group_size": 64}, torch.float16),
    "5bit": ({"nbits": 5, "group_size": 16}, torch.float32),
    "4bit": ({"nbits": 4, "group_size": 64}, torch.float16),
    "4bit-bfloat16": ({"nbits": 4, "group_size": 32}, torch.bfloat16),
    "4bit-view": ({"nbits": 4, "group_size": 32, "view_as_float": True}, torch.float16),
    "4bit-row": ({"nbits": 4, "group_size": None}, torch.float16),
    "3bit": ({"nbits": 3, "group_size": 32}, torch.float16),
    "3bit-view": ({"nbits": 3, "group_size": 64, "view_as_float": True}, torch.bfloat16),
    "2bit": ({"nbits": 2, "group_size": 16}, torch.float16),
    "2bit-view": ({"nbits": 2, "group_size": 8, "view_as_float": True}, torch.float32),
    "1.58bit": ({"nbits": 1.58, "group_size": 32}, torch.float16),
    "1bit": ({"nbits": 1, "group_size": 16}, torch.float16),
    "axis0": ({"nbits": 4, "group_size": 16, "axis": 0}, torch.float16),
}


def quantized(weight, options, dtype):
    """(hqq's tensors, what it dequantizes them to in float32)."""
    linear = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    linear.weight.data = weight.clone()
    config = BaseQuantizeConfig(**{"axis": 1, **options})
    layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
    state = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    return state, dequantized(dict(state))


def dequantized(state):
    layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
    layer.load_state_dict(state)
    return layer.dequantize().detach().clone()


def weights():
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for case, (options, dtype) in CASES.items():
        weight = torch.randn(SHAPE, generator=generator) + 0.3
        state, expected = quantized(weight, options, dtype)
        tensors |= {f"{case}.{name}": value for name, value in state.items()}
        tensors[f"{case}.expected"] = expected
    save_file(tensors, Path(__file__).with_name(f"hqq-{version('hqq')}.safetensors"))


def mixtral():
    """Experts of 2 bits beside attention of 4, as the first Mixtrals of hqq had them."""
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM, HqqConfig, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
        initializer_range=0.15,
    )
    four = {"nbits": 4, "group_size": 64, "axis": 1}
    two = {"nbits": 2, "group_size": 16, "axis": 1}
    dynamic = {f"self_attn.{name}_proj": four for name in "qkvo"}
    dynamic |= {f"block_sparse_moe.experts.w{number}": two for number in (1, 2, 3)}
    out = Path(__file__).with_name(f"hqq-{version('hqq')}")
    model = AutoModelForCausalLM.from_config(config).half()
    model.eval()
    settings = HqqConfig(dynamic_config=dynamic)
    AutoHQQHFModel.quantize_model(
        model, settings.quant_config, compute_dtype=torch.float16, device="cpu"
    )
    # As transformers' own saving has it, which quantizes on a GPU only.
    model.config.quantization_config = settings.to_dict()
    AutoHQQHFModel.save_to_safetensors(model, str(out))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, HQQLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dense(layer))
    whole = AutoModelForCausalLM.from_config(config).eval()  # its rotary angles are float32
    whole.load_state_dict(model.float().state_dict())
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        logits = whole(input_ids=ids).logits
    save_file({"ids": ids, "logits": logits}, out.with_name(f"{out.name}-logits.safetensors"))


def dense(layer):
    """The linear layer of what hqq dequantizes to in float32."""
    weight = dequantized(dict(layer.state_dict()))
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


if __name__ == "__main__":
    mixtral() if sys.argv[1:] == ["mixtral"] else weights()
