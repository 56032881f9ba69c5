"""Write peft-VERSION/ beside this file: a tiny Mixtral, LoRAs that PEFT made of it, and its merges.

    python tests/golden/make_peft.py    # in an environment with peft

Kept as oracle: PEFT 0.21.2 (transformers 5.23.0, torch 2.13 CPU). Needs no qmix. `base` is in
float32; each other folder is what PEFT's `save_pretrained` writes, and NAME-merged.safetensors the
weights after `merge_and_unload`, under the classic names of the hub's Mixtral-8x7B.
"""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

OUT = Path(__file__).with_name(f"peft-{version('peft')}")
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8, "vocab_size": 64,
    "max_position_embeddings": 64, "rope_theta": 1e6,
}  # fmt: skip
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# name: classic modules, of which each expert is three, or transformers' own; and PEFT's settings
CASES = {
    "experts": (
        True,
        {"target_modules": ["w1", "w2", "w3"], "r": 4, "lora_alpha": 8},
    ),
    "patterns": (
        True,
        {
            "target_modules": "all-linear", "r": 4, "lora_alpha": 6,
            "rank_pattern": {"q_proj": 2, r"experts\.1\.w2": 3}, "alpha_pattern": {"v_proj": 5},
        },
    ),
    "rslora": (
        True,
        {"target_modules": ["q_proj", "w3", "gate"], "r": 6, "lora_alpha": 4, "use_rslora": True},
    ),
    "dora": (True, {"target_modules": ["k_proj", "w1"], "r": 4, "lora_alpha": 8, "use_dora": True}),
    "whole": (
        True,
        {
            "target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 3, "lora_alpha": 7,
            "modules_to_save": ["norm", "o_proj"],
        },
    ),
    "stacked": (
        False,
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 4, "lora_alpha": 9},
    ),
}  # fmt: skip


class Classic(nn.Module):
    """Modules with the classic names, which PEFT wraps; nothing is ever computed."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf, _ = name.split(".")
            parent = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            if tensor.dim() == 1:
                module = nn.RMSNorm(len(tensor))
            elif leaf == "embed_tokens":
                module = nn.Embedding(*tensor.shape)
            else:
                module = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
            module.weight.data.copy_(tensor)
            parent.add_module(leaf, module)


def classic(model):
    """The weights by their classic names; stacked experts are taken apart."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name.replace(".mlp.", ".block_sparse_moe.")
        stacked = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if not stacked:
            tensors[name] = tensor.contiguous().clone()
            continue
        for expert, matrix in enumerate(tensor):
            parts = (
                zip(("w1", "w3"), matrix.chunk(2), strict=True)
                if "up" in name
                else (("w2", matrix),)
            )
            for part, rows in parts:
                tensors[f"{stacked[1]}.{expert}.{part}.weight"] = rows.contiguous().clone()
    return tensors


def fill(model):
    """Numbers for everything that PEFT starts with zeros."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(0, 0.3)
        elif parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)


def write(name, base, tensors, is_classic, settings):
    torch.manual_seed(len(name))
    model = Classic(tensors) if is_classic else base
    if settings["target_modules"] == "all-linear":
        settings = {**settings, "target_modules": r".*\.(q_proj|k_proj|v_proj|o_proj|w1|w2|w3)"}
    peft = get_peft_model(model, LoraConfig(**settings))
    fill(peft)
    peft.save_pretrained(OUT / name)
    (OUT / name / "README.md").unlink()
    fresh = Classic(tensors) if is_classic else MixtralForCausalLM.from_pretrained(OUT / "base")
    merged = PeftModel.from_pretrained(fresh, OUT / name).merge_and_unload()
    found = merged.state_dict() if is_classic else classic(merged)
    assert found.keys() == tensors.keys(), found.keys() ^ tensors.keys()
    changed = {n: t.contiguous() for n, t in found.items() if not torch.equal(t, tensors[n])}
    print(name, len(changed), "of", len(found), "tensors differ from the base")
    save_file(changed, OUT / f"{name}-merged.safetensors")


def main():
    OUT.mkdir()
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**SHAPE, architectures=["MixtralForCausalLM"])).eval()
    for parameter in base.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    base.save_pretrained(OUT / "base")
    (OUT / "base" / "generation_config.json").unlink(missing_ok=True)
    tensors = classic(base)
    for name, (is_classic, settings) in CASES.items():
        own = MixtralForCausalLM.from_pretrained(OUT / "base")
        write(name, own, tensors, is_classic, settings)
    config = json.loads((OUT / "base" / "config.json").read_text())
    assert config["model_type"] == "mixtral"


if __name__ == "__main__":
    sys.exit(main())
