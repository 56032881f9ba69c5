"""What gptqmodel itself quantizes and packs: the goldens beside this file, or a rival's checkpoint.

    make goldens         # both set up .oracles/gptqmodel and run this file there, the first as
    make rivals          # make_gptqmodel.py, the second as make_gptqmodel.py MODEL TEXT OUT OPTIONS

The first writes gptqmodel-VERSION.safetensors (single weights of every variant, each with the
values that gptqmodel reads back), gptqmodel-VERSION/ (a Mixtral of one layer) and, packed and read
by AutoGPTQ, auto-gptq-VERSION.safetensors.
The second quantizes a Mixtral on 128 windows of 512 tokens
of a text, cut as `qmix quantize` cuts it. OPTIONS is a JSON object for gptqmodel's QuantizeConfig,
such as {"group_size": 32}; its defaults hold otherwise.

Kept as oracles: gptqmodel 7.7.0 and auto-gptq 0.7.1 (torch 2.13 CPU, transformers 5.23.0). Only the
second way needs qmix.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import distribution, version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # fewer, the default of two cores, and it stops
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch import TorchLinear, dequantize_model  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear  # noqa: E402
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm  # noqa: E402
from gptqmodel.quantization.gptq import GPTQ  # noqa: E402
from gptqmodel.quantization.quantizer import Quantizer  # noqa: E402
from gptqmodel.utils.model import (  # noqa: E402
    convert_gptq_v1_to_v2_format_module,
    convert_gptq_v2_to_v1_format_module,
)
from safetensors.torch import save_file  # noqa: E402

from tests.support import exact  # noqa: E402

NAME = f"gptqmodel-{version('gptqmodel')}"
OLDER = f"auto-gptq-{version('auto-gptq')}"
SHAPE = (8, 256)
OLDER_SHAPE = (32, 64)  # AutoGPTQ packs 32 outputs at least
TOKENS = 512
SAMPLES, SEQLEN = 128, 512
TOKENIZER = HERE.parents[1] / "evals" / "tiny"
GPTQ_CASES = [
    (bits, group, symmetric, act_order)
    for bits, groups in ((4, (-1, 32, 64, 128)), (8, (32,)))
    for group in groups
    for symmetric in (True, False)
    for act_order in (False, True)
]
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def name_of(bits, group, symmetric, act_order):
    zeros = "symmetric" if symmetric else "asymmetric"
    return f"gptq-{bits}bit-group{group}-{zeros}-{'act' if act_order else 'in'}-order"


def drawn(seed, shape=SHAPE):
    """A weight and inputs of unequal sizes for it."""
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = torch.randn(shape, generator=generator) / 16
    inputs = torch.randn(TOKENS, shape[1], generator=generator)
    return linear, inputs * (0.2 + torch.rand(shape[1], generator=generator))


def drawn_with_a_zero_of_0(seed):
    """As `drawn`, one row all positive."""
    linear, inputs = drawn(seed)
    linear.weight.data[3].abs_()
    return linear, inputs


def solved(linear, inputs, config):
    """A weight quantized by gptqmodel's solver: its scales, zeros and groups; changes `linear`."""
    solver = GPTQ(linear, config)
    solver.quantizer.configure(perchannel=True)
    solver.add_batch(inputs, linear(inputs))
    weight, scales, zeros, groups, *_ = solver.quantize()
    linear.weight.data = weight
    return scales, zeros, groups


@torch.no_grad()
def gptq(seed, bits, group, symmetric, act_order):
    """The tensors of one weight in v1 and v2, and what gptqmodel reads from both."""
    linear, inputs = drawn_with_a_zero_of_0(seed)
    aware = False if act_order or group == -1 else None  # its default is to reorder within groups
    config = QuantizeConfig(
        bits=bits, group_size=group, sym=symmetric, desc_act=act_order, act_group_aware=aware
    )
    packed = TorchLinear(
        bits=bits,
        group_size=group,
        sym=symmetric,
        desc_act=act_order,
        in_features=SHAPE[1],
        out_features=SHAPE[0],
        register_buffers=False,
    ).eval()
    packed.pack_original(linear, *solved(linear, inputs, config))
    packed.post_init()
    second = packed.qzeros.clone()
    values = packed.dequantize_weight().T
    convert_gptq_v2_to_v1_format_module(packed, config)
    first = packed.qzeros.clone()
    convert_gptq_v1_to_v2_format_module(packed, bits, torch.int32)
    if not torch.equal(packed.dequantize_weight().T, values):
        raise SystemExit("gptqmodel reads v1 and v2 differently")
    return {
        "qweight": packed.qweight,
        "qzeros.v1": first,
        "qzeros.v2": second,
        "scales": packed.scales,
        "g_idx": packed.g_idx,
        "expected": values,
    }


def auto_gptq():
    """AutoGPTQ's layer, from its file: the package as a whole fails with transformers 5."""
    file = distribution("auto-gptq").locate_file("auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    spec = importlib.util.spec_from_file_location("qlinear_cuda", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


@torch.no_grad()
def older(seed, symmetric, act_order):
    """The tensors of one weight as AutoGPTQ packs it in v1, and what it multiplies by."""
    linear, inputs = drawn(seed, OLDER_SHAPE)
    config = QuantizeConfig(
        bits=4, group_size=32, sym=symmetric, desc_act=act_order, act_group_aware=False
    )
    parameters = solved(linear, inputs, config)
    packed = auto_gptq()(4, 32, OLDER_SHAPE[1], OLDER_SHAPE[0], bias=False)
    packed.pack(linear.half(), *parameters)
    values = packed(torch.eye(OLDER_SHAPE[1], dtype=torch.float16)).T
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {**{name: getattr(packed, name) for name in names}, "expected": values}


@torch.no_grad()
def awq(seed, group):
    """The tensors of one weight rounded to nearest and packed as AWQ, and what they read as."""
    linear, _ = drawn_with_a_zero_of_0(seed)
    quantizer = Quantizer(QuantizeConfig(sym=False))
    quantizer.configure(perchannel=True)
    parts, scales, zeros = [], [], []
    for part in linear.weight.data.split(group, dim=1):
        quantizer.find_params(part, weight=True)
        quantizer.scale = quantizer.scale.half().float()
        parts.append(quantizer.quantize(part))
        scales.append(quantizer.scale)
        zeros.append(quantizer.zero)
    linear.weight.data = torch.cat(parts, dim=1)
    packed = AwqTorchLinear(
        bits=4,
        group_size=group,
        sym=False,
        desc_act=False,
        in_features=SHAPE[1],
        out_features=SHAPE[0],
    )
    packed.pack(linear, torch.cat(scales, dim=1), torch.cat(zeros, dim=1))
    read = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, group)
    return {
        "qweight": packed.qweight,
        "qzeros": packed.qzeros,
        "scales": packed.scales,
        "expected": read.T,
    }


def quantize(source, windows, out, options):
    """Quantize a Mixtral directory; stop if a weight was left out or rounded without calibration.

    Args:
        windows: int64 (W, S) token ids.
        options: of QuantizeConfig.
    """
    rows = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows
    ]
    chosen = QuantizeConfig(**{"offload_to_disk": False, **options})
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # it writes logs/
        model = GPTQModel.load(str(source), chosen, device="cpu")
        config = model.model.config
        report = model.quantize(rows, batch_size=1)
        model.save(str(out))
    done = [row for rows in report.values() for row in rows]
    expected = config.num_hidden_layers * (4 + 3 * config.num_local_experts)
    fallen = [row["module"] for row in done if "fallback" in str(row["loss"])]
    if len(done) != expected or fallen:
        raise SystemExit(
            f"{len(done)} of {expected} weights quantized; without calibration: {fallen}"
        )
    return done


def mixtral(out):
    """Write the small Mixtral quantized; return its weights and float32 logits, as read back."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        shutil.copytree(TOKENIZER, source, ignore=shutil.ignore_patterns("model*", "*.md"))
        shutil.copy(TOKENIZER / "tokenizer.model", source)
        (source / "config.json").write_text(json.dumps(MIXTRAL))
        tensors = exact.weights(exact.mixtral_shapes(MIXTRAL), 0)
        tensors = {name: value.bfloat16() for name, value in tensors.items()}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        windows = exact.ids(16 * 64, MIXTRAL["vocab_size"], 1).view(16, 64)
        quantize(source, windows, Path(scratch, "out"), {"group_size": 32, "desc_act": True})
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name in ("config.json", "quantize_config.json", "model.safetensors"):
            shutil.copy(Path(scratch, "out", name), out)
        loaded = GPTQModel.load(
            str(Path(scratch, "out")), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
        ).model
    weights = {
        name: module.dequantize_weight().T
        for name, module in loaded.named_modules()
        if isinstance(module, TorchLinear)
    }
    ids = exact.ids(exact.SEQUENCE, MIXTRAL["vocab_size"], 2)[None]
    with torch.no_grad():
        logits = dequantize_model(loaded).float()(input_ids=ids, use_cache=False).logits[0]
    return {**weights, "logits": logits}


def named(prefix, tensors):
    return {f"{prefix}.{name}": value.contiguous() for name, value in tensors.items()}


def make():
    tensors, older_tensors = {}, {}
    for seed, case in enumerate(GPTQ_CASES):
        tensors |= named(name_of(*case), gptq(seed, *case))
    for group in (32, 128):
        tensors |= named(f"awq-group{group}", awq(group, group))
    tensors |= named("mixtral", mixtral(HERE / NAME))
    for symmetric, act_order in ((True, True), (False, False)):
        case = name_of(4, 32, symmetric, act_order)
        older_tensors |= named(case, older(0, symmetric, act_order))
    files = HERE / f"{NAME}.safetensors", HERE / f"{OLDER}.safetensors"
    for file, content in zip(files, (tensors, older_tensors), strict=True):
        save_file(content, file)
        file.chmod(0o644)
    written = [*files, *(HERE / NAME).iterdir()]
    print(
        f"{len(tensors) + len(older_tensors)} tensors, {sum(p.stat().st_size for p in written)} B"
    )


def rival(source, text, out, options="{}"):
    """A checkpoint for the comparison, with the source's tokenizer files beside it."""
    from qmix.quantize.calibrated.windows import calibration_windows
    from qmix.text.tokenizer import LlamaTokenizer

    source, out = Path(source).resolve(), Path(out).resolve()
    encode = LlamaTokenizer.from_pretrained(source).encode
    windows = calibration_windows(
        Path(text).read_text(encoding="utf-8"), encode, samples=SAMPLES, seqlen=SEQLEN
    )
    done = quantize(source, windows.ids, out, json.loads(options))
    # transformers 5 saves a tokenizer.json that splits some texts otherwise than its source.
    (out / "tokenizer.json").unlink(missing_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(source / name, out)
    seen = min(int(row["samples"]) for row in done)
    print(f"{out}: {len(done)} weights, each from {seen} tokens or more")


if __name__ == "__main__":
    rival(*sys.argv[1:]) if len(sys.argv) > 1 else make()
