"""Write auto-round-VERSION.safetensors and a folder: what AutoRound packs and what it reads.

    python tests/golden/make_auto_round.py    # in an environment with auto-round

Kept as oracle: auto-round 0.16.0 (torch 2.13 CPU, transformers 5.23.0). Needs no qmix.
"""

import shutil
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

SHAPE = (32, 64)
PACKINGS = {
    "auto_round:auto_gptq": qlinear_torch_zp.QuantLinear,  # zeros minus one
    "auto_round": qlinear_torch.QuantLinear,
}
CASES = [  # bits, group size, symmetric
    *((bits, 32, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    (4, -1, True),
    (2, 64, False),
]


def rounded(weight, bits, size, symmetric):
    """(scales, zeros) [N, G] of plain rounding; zeros are one number if symmetric."""
    grouped = weight.view(weight.shape[0], -1, weight.shape[1] if size == -1 else size)
    if symmetric:
        return (grouped.abs().amax(-1) / (1 << bits - 1)).half(), 1 << bits - 1
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((high - low) / ((1 << bits) - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, (1 << bits) - 2)
    return scales, zeros


def linear_of(weight):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


def as_gptq(make, weight, bits, size, symmetric):
    """(the tensors, the weight in float16 that AutoRound multiplies by)."""
    scales, zeros = rounded(weight, bits, size, symmetric)
    layer = make(bits, size, SHAPE[1], SHAPE[0], bias=False)
    layer.device = torch.device("cpu")
    layer.pack(linear_of(weight), scales.float(), zeros, None, device="cpu")
    expected = layer(torch.eye(SHAPE[1], dtype=torch.float16)).T.contiguous()
    return {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}, expected


def as_awq(weight, size, symmetric):
    scales, zeros = rounded(weight, 4, size, symmetric)
    zeros = zeros if symmetric else zeros.T.contiguous()
    layer = WQLinear_GEMM.from_linear(
        linear_of(weight), 4, size, scales=scales.float().T.contiguous(), zeros=zeros, device="cpu"
    )
    tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    return tensors, dequantize_gemm(*tensors.values(), 4, size).T.contiguous()


def main():
    tensors = {}
    generator = torch.Generator().manual_seed(0)

    def keep(case, packed, expected):
        assert expected.dtype == torch.float16
        tensors.update({f"{case}.{name}": value.contiguous() for name, value in packed.items()})
        tensors[f"{case}.expected"] = expected

    for packing, make in PACKINGS.items():
        for bits, size, symmetric in CASES:
            weight = torch.randn(SHAPE, generator=generator) + 0.3
            case = f"{packing} {bits} bits g{size} {'sym' if symmetric else 'asym'}"
            keep(case, *as_gptq(make, weight, bits, size, symmetric))
    for symmetric in (True, False):
        weight = torch.randn(SHAPE, generator=generator) + 0.3
        case = f"auto_round:auto_awq 4 bits g32 {'sym' if symmetric else 'asym'}"
        keep(case, *as_awq(weight, 32, symmetric))
    name = f"auto-round-{version('auto-round')}.safetensors"
    save_file(tensors, Path(__file__).with_name(name))


def stacked(state):
    """The experts' matrices as the one parameter that transformers 5 keeps them in."""
    whole = {name: value for name, value in state.items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([state[f"{prefix}{e}.{name}_proj.weight"] for e in range(4)])
            for name in ("gate", "up", "down")
        )
        whole[f"{prefix}gate_up_proj"] = torch.cat((gate, up), 1)
        whole[f"{prefix}down_proj"] = down
    return whole


def mixtral():
    """A whole Mixtral, rounded and saved by AutoRound, and what its weights compute in float32."""
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
    words = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, unk_token="0"))
    out = Path(__file__).with_name(f"auto-round-{version('auto-round')}")
    with TemporaryDirectory() as folder:
        MixtralForCausalLM(config).half().save_pretrained(f"{folder}/dense")
        AutoRound(
            MixtralForCausalLM.from_pretrained(f"{folder}/dense", dtype=torch.float16),
            PreTrainedTokenizerFast(tokenizer_object=words),
            bits=4,
            group_size=32,
            sym=False,
            iters=0,
            disable_opt_rtn=True,
            device_map="cpu",
            enable_torch_compile=False,
            layer_config={"self_attn.o_proj": {"bits": 8}},
        ).quantize_and_save(f"{folder}/out", format="auto_round")
        (saved,) = Path(folder, "out").iterdir()
        out.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(saved / name, out)
    model = MixtralForCausalLM.from_pretrained(out, device_map="cpu")
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "qweight"):
            weight = layer(torch.eye(layer.infeatures, dtype=torch.float16)).T.float()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear_of(weight.contiguous()))
    whole = MixtralForCausalLM(config).float().eval()
    state = {name: value.float() for name, value in model.state_dict().items()}
    whole.load_state_dict(stacked(state))
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        logits = whole(input_ids=ids).logits
    save_file({"ids": ids, "logits": logits}, out.with_name(f"{out.name}-logits.safetensors"))


if __name__ == "__main__":
    main()
    mixtral()
