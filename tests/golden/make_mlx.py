"""Write mlx-VERSION/ beside this file: tiny Mixtrals of mlx-lm, and what mlx reads in them.

    python tests/golden/make_mlx.py    # in an environment with "mlx[cpu]" and mlx-lm, on Linux

Kept as oracle: mlx 0.32.4, mlx-lm 0.32.2. Needs neither qmix nor torch. Each folder holds what
`mlx_lm.utils.save_model` and `save_config` write; expected.json beside them holds, by folder:

    weights: SHA-256 of each weight in float32, as mlx dequantizes its codes with scales and biases
        that were brought into float32; by the hub's classic names of modules
    rounded: the largest difference of these from what mlx makes in the scales' own dtype
    logits: of mlx-lm's model in float32 [positions, vocabulary], of ids 1 to 8; null where
        mlx needs a GPU

"mlx-old" has the names that mlx-lm wrote until it stacked experts, and still reads.
"""

import hashlib
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.mixtral import Model, ModelArgs
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

OUT = Path(__file__).with_name(f"mlx-{version('mlx')}")
IDS = list(range(1, 9))
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
STACKS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def mixed(path, module):
    """Bits and groups of single modules, and one that stays dense."""
    if path.endswith("o_proj"):
        return False
    if "switch_mlp" in path:
        bits = {"gate_proj": 2, "up_proj": 3, "down_proj": 6}[path.rpartition(".")[2]]
        return {"group_size": 32, "bits": bits, "mode": "affine"}
    if path.endswith("v_proj"):
        return {"group_size": 64, "bits": 5, "mode": "affine"}
    return True


# name: dtype, config, arguments of quantize_model
CASES = {
    "affine4": (mx.bfloat16, {}, {"group_size": 64, "bits": 4}),
    "affine8": (mx.float16, {}, {"group_size": 32, "bits": 8}),
    "affine4-g128": (
        mx.bfloat16,
        {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 16},
        {"group_size": 128, "bits": 4},
    ),
    "mixed": (mx.float32, {}, {"group_size": 32, "bits": 4, "quant_predicate": mixed}),
    "tied": (mx.bfloat16, {"tie_word_embeddings": True}, {"group_size": 64, "bits": 4}),
    "mxfp4": (mx.bfloat16, {}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
    "nvfp4": (mx.bfloat16, {}, {"group_size": 16, "bits": 4, "mode": "nvfp4"}),
    "nvfp4-experts": (
        mx.bfloat16,
        {},
        {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True},
    ),
    "dense": (mx.bfloat16, {"num_attention_heads": 4, "vocab_size": 16}, None),
}


def write(folder, dtype, changes, options):
    mx.random.seed(0)
    config = {**CONFIG, **changes, "torch_dtype": str(dtype).removeprefix("mlx.core.")}
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    if options is not None:
        model, config = quantize_model(model, config, **options)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    (folder / "model.safetensors.index.json").unlink()


def write_old(source, folder):
    """The same with a tensor for each expert; the settings as mlx-lm 0.0 wrote them."""
    tensors = {}
    for name, value in mx.load(str(source / "model.safetensors")).items():
        match = re.fullmatch(r"(.*)\.switch_mlp\.(\w+_proj)\.(\w+)", name)
        if match is None:
            tensors[name] = value
            continue
        block, stack, part = match.groups()
        for expert in range(value.shape[0]):
            tensors[f"{block}.experts.{expert}.{STACKS[stack]}.{part}"] = value[expert]
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    del config["quantization"]["mode"]
    (folder / "config.json").write_text(json.dumps(config, indent=4))


def module_names(path, experts):
    """The classic names of a module's weights; None stands for what is not stacked."""
    match = re.fullmatch(r"(.*)\.switch_mlp\.(\w+_proj)", path)
    if match is None:
        return {None: path}
    return {e: f"{match[1]}.experts.{e}.{STACKS[match[2]]}" for e in range(experts)}


def expected(folder):
    model, config = load_model(folder)
    weights, rounded = {}, 0.0
    for path, module in model.named_modules():
        if "scales" not in module:
            continue
        for expert, name in module_names(path, config["num_local_experts"]).items():
            parts = {}
            for key in ("weight", "scales", "biases", "global_scale"):
                value = module.get(key)
                parts[key] = value if expert is None or value is None else value[expert]
            exact, own = dequantized(module, parts, mx.float32), dequantized(module, parts, None)
            data = np.array(exact, dtype=np.float32) + 0.0  # minus zero is zero
            weights[name] = hashlib.sha256(data.tobytes()).hexdigest()
            rounded = max(rounded, mx.abs(exact - own.astype(mx.float32)).max().item())
    model.set_dtype(mx.float32)
    logits = None
    if "experts" not in folder.name:  # mlx multiplies with a global scale on a GPU only
        logits = np.array(model(mx.array([IDS]))[0]).tolist()
    return {"weights": weights, "rounded": rounded, "logits": logits}


def dequantized(module, parts, dtype):
    """A weight in `dtype`; None is the scales' own, or bfloat16."""
    scales, biases = parts["scales"], parts["biases"]
    if dtype is not None and biases is not None:
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    return mx.dequantize(
        parts["weight"],
        scales,
        biases,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        global_scale=parts["global_scale"],
        dtype=dtype,
    )


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    found = {}
    for name, case in CASES.items():
        write(OUT / name, *case)
        found[name] = expected(OUT / name)
    write_old(OUT / "affine4", OUT / "mlx-old")
    found["mlx-old"] = expected(OUT / "mlx-old")
    (OUT / "expected.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, facts in found.items():
        print(name, len(facts["weights"]), "weights, rounded by", facts["rounded"])


if __name__ == "__main__":
    main()
