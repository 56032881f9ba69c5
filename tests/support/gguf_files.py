"""Small GGUF files, written field by field so that a test can make any of them wrong."""

import struct
from array import array
from pathlib import Path

import sentencepiece
import torch
from safetensors import safe_open

from qmix.gguf.tensor_types import TYPES
from qmix.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN
from tests.support.models import TINY

GOLDEN = Path(__file__).parent.parent / "golden"
NUMBERS = {kind.name: number for number, kind in TYPES.items()}
STRING, ARRAY = 8, 9


def string(text):
    """A string with its length; bytes are written as they are."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item):
    """A value with its type: integers as uint32, floats as float32, of lists by the first item.

    The numbers of an `array.array` have its type. Bytes are a type and a value already.
    """
    if isinstance(item, bytes):
        return item
    if isinstance(item, array):
        kind = "BbHhIif".index(item.typecode)
        return struct.pack("<IIQ", ARRAY, kind, len(item)) + item.tobytes()
    if isinstance(item, (list, tuple)):
        kind, _ = scalar(item[0]) if item else (STRING, b"")
        data = b"".join(scalar(one)[1] for one in item)
        return struct.pack("<IIQ", ARRAY, kind, len(item)) + data
    kind, data = scalar(item)
    return struct.pack("<I", kind) + data


def scalar(item):
    """(type, bytes) of one value; negative integers are int32."""
    if isinstance(item, bool):
        return 7, bytes([item])
    if isinstance(item, str):
        return STRING, string(item)
    if isinstance(item, float):
        return 6, struct.pack("<f", item)
    return (5, struct.pack("<i", item)) if item < 0 else (4, struct.pack("<I", item))


def gguf_bytes(metadata, tensors, *, version=3, alignment=32, counts=None):
    """A whole file.

    Args:
        metadata: key -> value; see `value`.
        tensors: name -> (type, shape outermost first, bytes).
        counts: (tensors, keys) that the header claims; None: what there is.
    """
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(metadata))))
    keys = b"".join(string(key) + value(item) for key, item in metadata.items())
    entries, data = b"", b""
    for name, (kind, shape, raw) in tensors.items():
        entries += string(name) + struct.pack("<I", len(shape))
        entries += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        entries += struct.pack("<IQ", NUMBERS.get(kind, kind), len(data))
        data += raw + bytes(-len(raw) % alignment)
    header = head + keys + entries
    return header + bytes(-len(header) % alignment) + data


def golden_rows(kind):
    """(blocks, values) of a type, uint8 [3, bytes of a row] and float32 [3, 512]."""
    with safe_open(GOLDEN / "gguf-0.19.0.safetensors", "pt") as golden:
        return golden.get_tensor(f"{kind}.blocks"), golden.get_tensor(f"{kind}.values")


def mixtral_metadata(config):
    """What llama.cpp writes of a model, with tokens that stand for nothing."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"token{number}" for number in range(config.vocab_size - 3)]
    return {
        "general.architecture": "llama",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "llama.expert_count": config.num_local_experts,
        "llama.expert_used_count": config.num_experts_per_tok,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": array("i", [2, 3, 3, *(1 for _ in tokens[3:])]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def tokenizer_metadata(path=TINY / "tokenizer.model"):
    """What llama.cpp's converter writes of a tokenizer.model."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    kinds = ((UNKNOWN, sp.is_unknown), (CONTROL, sp.is_control), (BYTE, sp.is_byte))
    ids = range(sp.get_piece_size())
    types = [next((kind for kind, asked in kinds if asked(i)), NORMAL) for i in ids]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tuple(sp.id_to_piece(i) for i in ids),
        "tokenizer.ggml.scores": array("f", [sp.get_score(i) for i in ids]),
        "tokenizer.ggml.token_type": array("i", types),
    }


def mixtral_tensors(model, *, stacked=True):
    """A model's weights in float16, norms and routers in float32, as llama.cpp names and orders
    them.

    Args:
        stacked: the experts of a layer lie in one tensor; False: in one each, as in 2023.
    """
    config, state = model.config, model.state_dict()
    tensors = {}

    def put(name, data, kind="F16"):
        data = data.detach().to(torch.float16 if kind == "F16" else torch.float32).contiguous()
        tensors[f"{name}.weight"] = (kind, tuple(data.shape), data.numpy().tobytes())

    put("token_embd", state["model.embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        to, of = f"blk.{layer}.", f"model.layers.{layer}."
        put(f"{to}attn_norm", state[f"{of}input_layernorm.weight"], "F32")
        put(f"{to}ffn_norm", state[f"{of}post_attention_layernorm.weight"], "F32")
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for part, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
            rows = state[f"{of}self_attn.{part}_proj.weight"]
            if part in heads:
                halves = rows.view(heads[part], 2, -1, rows.shape[1])
                rows = halves.transpose(1, 2).reshape(rows.shape)
            put(f"{to}attn_{name}", rows)
        put(f"{to}ffn_gate_inp", state[f"{of}block_sparse_moe.gate.weight"], "F32")
        for name, matrix in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            experts = [
                state[f"{of}block_sparse_moe.experts.{expert}.{matrix}.weight"]
                for expert in range(config.num_local_experts)
            ]
            if stacked:
                put(f"{to}ffn_{name}_exps", torch.stack(experts))
                continue
            for expert, data in enumerate(experts):
                put(f"{to}ffn_{name}.{expert}", data)
    put("output_norm", state["model.norm.weight"], "F32")
    if not config.tie_word_embeddings:
        put("output", state["lm_head.weight"])
    return tensors


def write_mixtral(path, model, *, stacked=True, changes=None):
    """A model as a GGUF file; `changes` are entries of the metadata, None removes one."""
    metadata = mixtral_metadata(model.config) | (changes or {})
    metadata = {key: item for key, item in metadata.items() if item is not None}
    path.write_bytes(gguf_bytes(metadata, mixtral_tensors(model, stacked=stacked)))
    return path


def write_shards(folder, model, count, name="m"):
    """A model as `count` GGUF files; the first has the metadata."""
    metadata, tensors = mixtral_metadata(model.config), list(mixtral_tensors(model).items())
    paths = []
    for index in range(count):
        split = {
            "split.no": struct.pack("<IH", 2, index),
            "split.count": struct.pack("<IH", 2, count),
            "split.tensors.count": struct.pack("<Ii", 5, len(tensors)),
        }
        own = {**(metadata if index == 0 else {}), **split}
        path = folder / f"{name}-{index + 1:05d}-of-{count:05d}.gguf"
        path.write_bytes(gguf_bytes(own, dict(tensors[index::count])))
        paths.append(path)
    return paths
