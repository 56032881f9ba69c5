"""Write gguf-0.19.0.safetensors and gguf-Q4_K_M.gguf by llama.cpp's own tools.

Run it with `.oracles/gguf/bin/python`; `make goldens` does. With `--tiny OUT` it writes evals/tiny
in every type that qmix reads into OUT instead, each with llama.cpp's logits beside it, for
check_gguf.py; the ids of a text may follow.

The safetensors file holds rows of every type (`TYPE.blocks`), and what gguf.quants makes of them
(`TYPE.values`). llama.cpp rounds activations to 8 bits before it multiplies quantized weights, so
its logits are given for the file as it is, and for the same weights in float32, where it does not.
"""

import ctypes
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file

HERE = Path(__file__).parent
TINY = HERE.parent.parent / "evals" / "tiny"
# Where a block has its float16 scales.
TYPES = {
    **dict.fromkeys(("Q4_0", "IQ4_NL", "IQ4_XS", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q4_K", "Q5_1", "Q5_K"), (0, 2)),
    "Q6_K": (208,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("IQ1_M", "MXFP4"), ()),  # it has none, or has one in pieces
}
FILES = (
    *("Q4_K_M", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL", "Q5_0", "Q5_1", "Q5_K_M", "Q6_K", "Q8_0"),
    *("Q3_K_M", "Q2_K", "IQ3_S", "IQ3_XXS"),
)
PROMPT = (1, 5, 77, 270, 12, 9, 200, 44, 3, 8, 260, 261, 143, 280)


class Model:
    """The tensors of a Mixtral, float32, by Hugging Face's names, and its sizes."""

    def __init__(self, tensors, *, layers, heads, kv_heads, experts, theta, pieces):
        self.tensors, self.layers, self.heads, self.kv_heads = tensors, layers, heads, kv_heads
        self.experts, self.theta, self.pieces = experts, theta, pieces

    def write(self, path):
        """In float32, as llama.cpp's convert_hf_to_gguf.py names and orders everything."""
        width = self["model.embed_tokens"].shape[1]
        out = gguf.GGUFWriter(path, "llama")
        out.add_name("tiny Mixtral")
        out.add_vocab_size(len(self.pieces))
        out.add_context_length(1024)
        out.add_embedding_length(width)
        out.add_block_count(self.layers)
        out.add_feed_forward_length(self["model.layers.0.block_sparse_moe.experts.0.w1"].shape[0])
        out.add_rope_dimension_count(width // self.heads)
        out.add_head_count(self.heads)
        out.add_head_count_kv(self.kv_heads)
        out.add_layer_norm_rms_eps(1e-5)
        out.add_rope_freq_base(self.theta)
        out.add_expert_count(self.experts)
        out.add_expert_used_count(2)
        out.add_tokenizer_model("llama")
        out.add_token_list([piece for piece, _, _ in self.pieces])
        out.add_token_scores([score for _, score, _ in self.pieces])
        out.add_token_types([kind for _, _, kind in self.pieces])
        out.add_bos_token_id(1)
        out.add_eos_token_id(2)
        out.add_unk_token_id(0)
        out.add_add_bos_token(True)
        out.add_tensor("token_embd.weight", self["model.embed_tokens"])
        for layer in range(self.layers):
            self._write_layer(out, f"blk.{layer}.", f"model.layers.{layer}.")
        out.add_tensor("output_norm.weight", self["model.norm"])
        out.add_tensor("output.weight", self["lm_head"])
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()

    def _write_layer(self, out, to, of):
        out.add_tensor(f"{to}attn_norm.weight", self[f"{of}input_layernorm"])
        out.add_tensor(f"{to}ffn_norm.weight", self[f"{of}post_attention_layernorm"])
        for name, heads in (("q", self.heads), ("k", self.kv_heads)):
            rows = self[f"{of}self_attn.{name}_proj"]
            halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
            out.add_tensor(f"{to}attn_{name}.weight", halves.swapaxes(1, 2).reshape(rows.shape))
        out.add_tensor(f"{to}attn_v.weight", self[f"{of}self_attn.v_proj"])
        out.add_tensor(f"{to}attn_output.weight", self[f"{of}self_attn.o_proj"])
        out.add_tensor(f"{to}ffn_gate_inp.weight", self[f"{of}block_sparse_moe.gate"])
        for name, matrix in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            experts = [
                self[f"{of}block_sparse_moe.experts.{expert}.{matrix}"]
                for expert in range(self.experts)
            ]
            out.add_tensor(f"{to}ffn_{name}_exps.weight", np.stack(experts))

    def __getitem__(self, module):
        return np.ascontiguousarray(self.tensors[f"{module}.weight"])


def random_model():
    """One layer with two experts; nothing larger is committed."""
    rng = np.random.default_rng(16)
    width, heads, kv_heads, experts, vocabulary = 256, 4, 2, 2, 320
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens": (vocabulary, width),
        f"{layer}self_attn.q_proj": (width, width),
        f"{layer}self_attn.k_proj": (width // 2, width),
        f"{layer}self_attn.v_proj": (width // 2, width),
        f"{layer}self_attn.o_proj": (width, width),
        f"{layer}block_sparse_moe.gate": (experts, width),
        "lm_head": (vocabulary, width),
    }
    for expert in range(experts):
        for matrix in ("w1", "w2", "w3"):
            shapes[f"{layer}block_sparse_moe.experts.{expert}.{matrix}"] = (width, width)
    tensors = {
        f"{name}.weight": (rng.standard_normal(shape) * shape[1] ** -0.5).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name in ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm"):
        tensors[f"{name}.weight"] = (1 + 0.1 * rng.standard_normal(width)).astype(np.float32)
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(f"▁{index}", -float(index), 1) for index in range(vocabulary - len(pieces))]
    return Model(
        tensors,
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        experts=experts,
        theta=1e6,
        pieces=pieces,
    )


def tiny_model():
    """evals/tiny, whose weights are bfloat16."""
    import json

    import sentencepiece

    config = json.loads((TINY / "config.json").read_text())
    tensors = {}
    for path in sorted(TINY.glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "BF16"
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            bits = np.frombuffer(raw[start:stop], np.uint16).astype(np.uint32) << 16
            tensors[name] = bits.view(np.float32).reshape(entry["shape"])
    sp = sentencepiece.SentencePieceProcessor(str(TINY / "tokenizer.model"))
    pieces = []
    for index in range(sp.get_piece_size()):
        kind = 3 if sp.is_control(index) else 2 if sp.is_unknown(index) else 1
        kind = 6 if sp.is_byte(index) else kind
        pieces.append((sp.id_to_piece(index), sp.get_score(index), kind))
    return Model(
        tensors,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        experts=config["num_local_experts"],
        theta=config["rope_theta"],
        pieces=pieces,
    )


def quantize(source, target, name):
    """By llama.cpp; `name` as its llama-quantize has it."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert status == 0, name


def dequantized(source, target):
    """The same file with all weights in float32."""
    reader = gguf.GGUFReader(source)
    out = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        out.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        out.add_tensor(tensor.name, values.reshape(tensor.shape[::-1].tolist()))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def logits(path, ids):
    """llama.cpp's, float32 [tokens, vocabulary].

    Without repacking for this CPU: its kernels crash on matrices this small (0.3.36).
    """
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_repacking():
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = without_repacking
    try:
        model = llama_cpp.Llama(
            str(path), logits_all=True, n_ctx=512, n_batch=512, n_threads=1, verbose=False
        )
    finally:
        llama_cpp.llama_cpp.llama_model_default_params = defaults
    model.eval(list(ids))
    return np.array(model.scores[: len(ids)], np.float32)


def both_logits(path, work, ids):
    """llama.cpp's logits of a file as it is, and of its weights in float32."""
    dequantized(path, work / "dequantized.gguf")
    return {
        "prompt": np.array(ids, np.int64),
        "logits": logits(path, ids),
        "exact": logits(work / "dequantized.gguf", ids),
    }


def golden_rows():
    """Three rows of 512 weights in every type, and their values.

    Two are normal numbers, by llama.cpp's quantizer. The blocks of the third are random bytes, so
    that they have every pattern of bits; only their float16 scales are small numbers.
    """
    rng = np.random.default_rng(7)
    rows = (rng.standard_normal((2, 512)) * [[0.02], [3.0]]).astype(np.float32)
    # Types of one and two bits are rounded with the importance of each input only.
    uniform = np.ones(rows.shape[1], np.float32)
    tensors = {}
    for name, scales in TYPES.items():
        importance = uniform if name.startswith(("IQ1", "IQ2")) else None
        kind = Type[name]
        nbytes = gguf.quants.quant_shape_to_byte_shape(rows.shape, kind)[1]
        blocks = np.empty((3, nbytes), np.uint8)
        llama_cpp.llama_cpp._lib.ggml_quantize_chunk(
            ctypes.c_int(kind),
            rows.ctypes.data_as(ctypes.c_void_p),
            blocks.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0),
            ctypes.c_int64(2),
            ctypes.c_int64(rows.shape[1]),
            None if importance is None else importance.ctypes.data_as(ctypes.c_void_p),
        )
        size = GGML_QUANT_SIZES[kind][1]
        random = rng.integers(0, 256, (nbytes // size, size), np.uint8)
        for start in scales:
            numbers = rng.standard_normal(len(random)).astype(np.float16)
            random[:, start : start + 2] = numbers[:, None].view(np.uint8)
        if name == "IQ1_M":
            random[:, 55] = random[:, 55] & 15 | 32  # the highest bits of its scale
        if name == "MXFP4":
            random[:, 0] = random[:, 0] % 253  # exponents whose values float32 holds
        blocks[2] = random.flatten()
        tensors[f"{name}.blocks"] = blocks
        tensors[f"{name}.values"] = gguf.quants.dequantize(blocks, kind)
    return tensors


def main(arguments):
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if arguments[:1] == ["--tiny"]:
            out = Path(arguments[1])
            out.mkdir(parents=True, exist_ok=True)
            text = [int(one) for one in arguments[2:]] or list(PROMPT)
            tiny_model().write(out / "F32.gguf")
            for kind in ("F16", "BF16", *FILES):
                quantize(out / "F32.gguf", out / f"{kind}.gguf", kind)
                found = both_logits(out / f"{kind}.gguf", work, text)
                save_file(found, out / f"{kind}.safetensors")
            return
        random_model().write(work / "F32.gguf")
        target = HERE / "gguf-Q4_K_M.gguf"
        quantize(work / "F32.gguf", target, "Q4_K_M")
        tensors = golden_rows() | both_logits(target, work, PROMPT)
        save_file(tensors, HERE / "gguf-0.19.0.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
