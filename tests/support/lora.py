"""LoRAs with random factors, named as PEFT names them."""

import json

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


def write_lora(folder, shapes, **config):
    """An adapter's folder with tensors of these shapes, by their names without PEFT's prefix."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(shape, generator=generator) / 8 for n, shape in shapes.items()}
    save_file(
        {PREFIX + name: tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    document = {"peft_type": "LORA", "lora_alpha": 2, "r": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return tensors


def write_attention_lora(folder, hidden):
    """One that changes the query projection of layer 0 of a model with as many heads' widths."""
    module = "model.layers.0.self_attn.q_proj"
    shapes = {f"{module}.lora_A.weight": (4, hidden), f"{module}.lora_B.weight": (hidden, 4)}
    return write_lora(folder, shapes)
