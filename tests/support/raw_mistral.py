"""Raw Mistral checkpoints written from a model, row by row and by none of qmix's code: an oracle.

The layouts are those of Mistral's own releases: `consolidated.*` files with `params.json`.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from qmix.commands.checkpoint.convert import convert_checkpoint
from qmix.errors import CheckpointError

LAYOUTS = ("pickles", "pth", "safetensors")


def interleaved(weight, heads):
    """Hugging Face's rotary rows (first halves, then second halves) back to Mistral's pairs."""
    width = weight.shape[0] // heads
    order = []
    for head in range(heads):
        for pair in range(width // 2):
            order.append(head * width + pair)
            order.append(head * width + width // 2 + pair)
    return torch.stack([weight[row] for row in order])


def raw_tensors(state, config, *, stacked):
    """Hugging Face's state dict -> Mistral's, with stacked or with single experts."""
    raw = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"layers.{layer}."
        raw[theirs + "attention_norm.weight"] = state[ours + "input_layernorm.weight"]
        raw[theirs + "ffn_norm.weight"] = state[ours + "post_attention_layernorm.weight"]
        for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            weight = state[ours + f"self_attn.{name}_proj.weight"]
            raw[theirs + f"attention.w{name}.weight"] = interleaved(weight, heads)
        for name in "vo":
            raw[theirs + f"attention.w{name}.weight"] = state[
                ours + f"self_attn.{name}_proj.weight"
            ]
        block = ours + "block_sparse_moe."
        router = "block_sparse_moe.gate.weight" if stacked else "feed_forward.gate.weight"
        raw[theirs + router] = state[block + "gate.weight"]
        for name in ("w1", "w2", "w3"):
            experts = [
                state[block + f"experts.{expert}.{name}.weight"]
                for expert in range(config.num_local_experts)
            ]
            if stacked:
                rows = [expert.T if name == "w2" else expert for expert in experts]
                raw[theirs + f"block_sparse_moe.{name}"] = torch.cat(rows).contiguous()
            else:
                for expert, weight in enumerate(experts):
                    raw[theirs + f"feed_forward.experts.{expert}.{name}.weight"] = weight
    return {name: tensor.detach().contiguous() for name, tensor in raw.items()}


def params(config, spelling):
    """params.json, by the hub's converter ("hf") or by mistral-inference ("dim")."""
    if spelling == "hf":
        return {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "num_local_experts": config.num_local_experts,
            "intermediate_size": config.intermediate_size,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "vocab_size": config.vocab_size,
            "sliding_window": "4096",
        }
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "moe": {
            "num_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        },
    }


def write_weights(folder, tensors, layout):
    """The files of one layout; the eight pickles get every eighth tensor each."""
    if layout == "safetensors":
        save_file(tensors, folder / "consolidated.safetensors")
    elif layout == "pth":
        torch.save(tensors, folder / "consolidated.00.pth")
    else:
        names = list(tensors)
        for index in range(8):
            part = {name: tensors[name] for name in names[index::8]}
            torch.save(part, folder / f"consolidated.{index:02}.pt")


def write(folder, model, *, layout="pickles", stacked=True, spelling="hf", tokenizer=None):
    """A whole raw folder of a model; returns the folder."""
    folder.mkdir(parents=True)
    tensors = raw_tensors(model.state_dict(), model.config, stacked=stacked)
    write_weights(folder, tensors, layout)
    (folder / "params.json").write_text(json.dumps(params(model.config, spelling)))
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


def refused(source, tmp_path, match, kind=CheckpointError):
    """Converting is refused with one printable line that names the folder, and leaves nothing."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(kind, match=match) as caught:
        convert_checkpoint(source, tmp_path / "refused")
    assert caught.value.exit_code == 3
    assert str(source) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == before
