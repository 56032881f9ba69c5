"""Random weights and ids that are the same bits on every machine and in every torch version.

Integer arithmetic only (splitmix64 of a counter), scaled by powers of two: no random number
generator whose stream could change, no rounding. Shared by the tests and by golden/make_logits.py,
so it imports neither qmix nor transformers.
"""

from math import prod

import numpy as np
import torch

SEQUENCE = 20
PROMPT = 8
NEW_TOKENS = 32
ROUTER_CASES = 2  # the first golden models, whose router logits are kept


def mix(seed, start, count):
    """`count` 64-bit hashes of the counter from `start` on (splitmix64: Steele et al. 2014)."""
    x = np.arange(start, start + count, dtype=np.uint64) + np.uint64(seed << 40)
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bell(hashes):
    """Integers of a bell shape: four 16-bit uniforms added, centred; deviation 37837."""
    quarters = [(hashes >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    return np.sum(quarters, axis=0, dtype=np.int64) - 2 * 0xFFFF


def weights(shapes, seed):
    """float32 tensors in the order of their sorted names; deviation 0.144, norms 1 +- 0.22.

    (initializer_range 0.15: at the default 0.02 the logits are almost flat and tests see nothing.)
    """
    tensors = {}
    start = 0
    for name in sorted(shapes):
        count = prod(shapes[name])
        drawn = bell(mix(seed, start, count))
        start += count
        if name.endswith("norm.weight"):
            values = ((1 << 19) + 3 * drawn).astype(np.float32) * np.float32(2.0**-19)
        else:
            values = drawn.astype(np.float32) * np.float32(2.0**-18)
        tensors[name] = torch.from_numpy(values).reshape(shapes[name])
    return tensors


def ids(count, vocabulary, seed):
    """int64 (count,), from 0 to vocabulary - 1."""
    drawn = mix(seed, 1 << 32, count) % np.uint64(vocabulary)
    return torch.from_numpy(drawn.astype(np.int64))


def mixtral_shapes(config):
    """Shapes by the names that Mixtral's checkpoints have on disk; `config` as in config.json."""
    d, f = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or d // config["num_attention_heads"]
    kv, wide = head * config["num_key_value_heads"], head * config["num_attention_heads"]
    vocabulary = config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocabulary, d), "model.norm.weight": (d,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocabulary, d)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, shape in (("q", (wide, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, wide))):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = shape
        shapes[f"{at}.input_layernorm.weight"] = (d,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (d,)
        shapes[f"{at}.block_sparse_moe.gate.weight"] = (config["num_local_experts"], d)
        for expert in range(config["num_local_experts"]):
            for name, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
                shapes[f"{at}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return shapes


def golden_cases():
    """Name -> config.json of the 36 golden models; a model's seed is its place in this order."""
    cases = {}
    for kv_heads in (1, 2, 8):
        for experts in (4, 8):
            for chosen in (1, 2, 3):
                for window in (None, 8):
                    name = f"kv{kv_heads}-experts{experts}-top{chosen}-window{window or 'none'}"
                    cases[name] = {
                        "architectures": ["MixtralForCausalLM"],
                        "model_type": "mixtral",
                        "vocab_size": 128,
                        "hidden_size": 64,
                        "intermediate_size": 96,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 8,
                        "num_key_value_heads": kv_heads,
                        "hidden_act": "silu",
                        "max_position_embeddings": 512,
                        "initializer_range": 0.15,
                        "rms_norm_eps": 1e-5,
                        "rope_theta": 1e6,
                        "sliding_window": window,
                        "num_local_experts": experts,
                        "num_experts_per_tok": chosen,
                        "router_aux_loss_coef": 0.02,
                        "tie_word_embeddings": False,
                        "bos_token_id": 1,
                        "eos_token_id": None,
                        "pad_token_id": 0,
                        "torch_dtype": "float32",
                    }
    return cases


def golden_inputs(seed):
    """Of one golden model: ids (1, 20), labels (1, 20) with gaps, prompt (1, 8), and a batch.

    The batch: ids (2, 20), mask (2, 20) and labels (2, 20); the second row ends in six pads.
    """
    drawn = ids(3 * SEQUENCE, 128, seed).view(3, 1, SEQUENCE)
    labels = drawn[0].clone()
    labels[0, 5:9] = -100
    batch = torch.cat([drawn[0], drawn[1]])
    mask = torch.ones_like(batch)
    mask[1, -6:] = 0
    batch[1, -6:] = 0
    batch_labels = batch.masked_fill(mask == 0, -100)
    return drawn[0], labels, drawn[2, :, :PROMPT], (batch, mask, batch_labels)


def page_cases():
    """Name -> config.json of the models of tests/golden/make_page.py.

    Two kinds of attention, and each field of the config whose effect the golden models do not show.
    """
    plain = golden_cases()["kv2-experts8-top2-windownone"]
    changes = {
        "plain": {},
        "window": {"sliding_window": 8},
        "gelu": {"hidden_act": "gelu"},
        "eps": {"rms_norm_eps": 0.1},
        "theta": {"rope_theta": 100.0},
        "positions": {"max_position_embeddings": 8},
        "tied": {"tie_word_embeddings": True},
        "experts16": {"num_local_experts": 16},
        "experts1": {"num_local_experts": 1, "num_experts_per_tok": 1},
        "head_dim": {"head_dim": 16},
    }
    return {name: {**plain, **change} for name, change in changes.items()}


PAGE_SEED = 100  # of the first page case; the others follow
LABELS = 5
DETAILED = ("plain", "window")  # the cases of which all outputs are kept


def score_weight(seed):
    """The classifier's weight (LABELS, 64) of one page case."""
    return weights({"score.weight": (LABELS, 64)}, seed + 1000)["score.weight"]


def page_batch(seed):
    """Ids (4, 20) and masks (4, 20): no padding, left, right, and in the middle; pads are id 0."""
    batch = ids(4 * SEQUENCE, 125, seed).view(4, SEQUENCE) + 3
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    mask[2, -6:] = 0
    mask[3, 8:11] = 0
    return batch.masked_fill(mask == 0, 0), mask


def page_labels():
    """Of the four rows: class ids (4,), floats (4,) and floats (4, LABELS)."""
    several = torch.zeros(4, LABELS)
    several[torch.arange(4), torch.tensor([0, 2, 4, 1])] = 1.0
    several[0, 3] = 1.0
    return torch.tensor([3, 0, 4, 1]), torch.tensor([0.5, -1.0, 2.0, 0.0]), several


def page_pairs():
    """A mask of pairs, bool (1, 1, 20, 20): causal, but that the first six see each other."""
    seen = torch.ones(SEQUENCE, SEQUENCE).tril().bool()
    seen[:6, :6] = True
    return seen[None, None]
