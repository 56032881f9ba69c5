"""The shape of the tiny Mixtral of make_compressed_floats and make_fp8, and its dense tensors."""

import torch

HIDDEN, INNER, VOCAB, EXPERTS = 32, 64, 64, 2
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "sliding_window": None,
}
LAYER = "model.layers.0"
ATTENTION = {"q_proj": (64, 32), "k_proj": (32, 32), "v_proj": (32, 32), "o_proj": (32, 64)}
EXPERT = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
LINEAR = {f"{LAYER}.self_attn.{name}": shape for name, shape in ATTENTION.items()} | {
    f"{LAYER}.block_sparse_moe.experts.{expert}.{name}": shape
    for expert in range(EXPERTS)
    for name, shape in EXPERT.items()
}


def random(generator, *shape):
    return (torch.randn(shape, generator=generator) * 0.3).bfloat16()


def dense_tensors(generator):
    """Embedding, head, norms and router, by name."""
    return {
        "model.embed_tokens.weight": random(generator, VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        "lm_head.weight": random(generator, VOCAB, HIDDEN),
        f"{LAYER}.input_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
        f"{LAYER}.post_attention_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
        f"{LAYER}.block_sparse_moe.gate.weight": random(generator, EXPERTS, HIDDEN),
    }
