"""llama.cpp's side of qmix.evals.cpu: a script for the interpreter that has llama-cpp-python.

`PYTHON llama_peer.py FOLDER KIND HIDDEN WIDTH EXPERTS HEADS KV_HEADS THREADS` writes synthetic
Mixtral files of one and of three layers into FOLDER, KIND-1.gguf and KIND-3.gguf (random codes,
scales that keep activations small). It prints its version as one line of JSON. It answers each
line `N` on stdin with `[one, three]`, the seconds that the two models took for a prompt of N random
tokens. Knows nothing of qmix.
"""

import ctypes
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 512
# Of a block: weights of about 0.01.
SCALES = {"Q4_0": 0.002, "Q4_K": 0.0002, "Q5_K": 0.0001, "Q6_K": 0.00001, "Q8_0": 0.0002,
          "IQ4_XS": 0.00001}  # fmt: skip
# What Q4_K_M stores otherwise in a model of eight experts, in the half of its layers that get more
# bits (llama_tensor_get_type of llama.cpp).
MIXTURE = {"attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q5_K", "ffn_down_exps": "Q6_K"}


def write_gguf(path: Path, kind: str, layers: int, sizes: list[int]) -> None:
    """Write a GGUF file of random matrices.

    Args:
        kind: Q4_0, Q4_K or IQ4_XS, which all matrices are, or Q4_K_M, a mixture.
        sizes: hidden width, expert width, experts, heads, key-value heads.
    """
    gguf: Any = importlib.import_module("gguf")
    hidden, width, experts, heads, kv_heads = sizes
    random = np.random.default_rng(0)

    def packed(stored: Any, *shape: int) -> Any:
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        raw = np.frombuffer(random.bytes(int(np.prod(shape)) // block * block_bytes), np.uint8)
        raw = raw.reshape(-1, block_bytes).copy()
        # The block's float16 scale, and in Q4_K the scale of its minima: weights of about 0.01.
        scale = np.float16(SCALES[stored.name]).reshape(1).view(np.uint8)
        raw[:, slice(-2, None) if stored.name == "Q6_K" else slice(2)] = scale
        if stored.name in ("Q4_K", "Q5_K"):
            raw[:, 2:4] = np.float16(0.0015).reshape(1).view(np.uint8)
        return raw.reshape(*shape[:-1], shape[-1] // block * block_bytes)

    def normal(*shape: int) -> Any:
        return random.standard_normal(shape).astype(np.float32) * 0.02

    out = gguf.GGUFWriter(str(path), "llama")
    _write_settings(out, layers, sizes)
    out.add_tensor("token_embd.weight", normal(VOCABULARY, hidden))
    out.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    out.add_tensor("output.weight", normal(VOCABULARY, hidden).astype(np.float16))
    head = hidden // heads
    for layer in range(layers):
        prefix = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"{prefix}{norm}.weight", np.ones(hidden, np.float32))
        out.add_tensor(f"{prefix}ffn_gate_inp.weight", normal(experts, hidden))
        for name, shape in (
            ("attn_q", (hidden, hidden)),
            ("attn_k", (kv_heads * head, hidden)),
            ("attn_v", (kv_heads * head, hidden)),
            ("attn_output", (hidden, hidden)),
            ("ffn_gate_exps", (experts, width, hidden)),
            ("ffn_up_exps", (experts, width, hidden)),
            ("ffn_down_exps", (experts, hidden, width)),
        ):
            mixed = MIXTURE.get(name, "Q4_K") if kind == "Q4_K_M" else kind
            stored = gguf.GGMLQuantizationType[mixed]
            out.add_tensor(f"{prefix}{name}.weight", packed(stored, *shape), raw_dtype=stored)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _write_settings(out: Any, layers: int, sizes: list[int]) -> None:
    hidden, width, experts, heads, kv_heads = sizes
    out.add_block_count(layers)
    out.add_context_length(4096)
    out.add_embedding_length(hidden)
    out.add_feed_forward_length(width)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_expert_count(experts)
    out.add_expert_used_count(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(hidden // heads)
    out.add_rope_freq_base(1e6)
    out.add_vocab_size(VOCABULARY)
    out.add_tokenizer_model("llama")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [f"t{index}" for index in range(VOCABULARY - len(names))]
    out.add_token_list([name.encode() for name in names])
    out.add_token_scores([0.0] * VOCABULARY)
    out.add_token_types([2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - 259)])


class LlamaModel:
    """A file, loaded into memory and not mapped, so that llama.cpp can repack it as it prefers."""

    def __init__(self, api: Any, path: Path, threads: int) -> None:
        self._api = api
        options = api.llama_model_default_params()
        options.n_gpu_layers, options.use_mmap = 0, False
        self._model = api.llama_model_load_from_file(str(path).encode(), options)
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 1024, 512, 512
        options.n_threads = options.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, options)

    def seconds(self, ids: list[int]) -> float:
        """Wall time of one forward pass over a prompt."""
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        begun = time.perf_counter()
        failed = api.llama_decode(self._context, api.llama_batch_get_one(tokens, len(ids)))
        api.llama_synchronize(self._context)
        elapsed = time.perf_counter() - begun
        assert not failed, failed
        return elapsed


def main(arguments: list[str]) -> None:
    """Answer until stdin ends; see the module's docstring."""
    folder, kind, threads = Path(arguments[0]), arguments[1], int(arguments[-1])
    package: Any = importlib.import_module("llama_cpp")

    quiet = package.llama_log_callback(lambda level, text, data: None)
    package.llama_log_set(quiet, ctypes.c_void_p(0))
    models = []
    for layers in (1, 3):
        path = folder / f"{kind}-{layers}.gguf"
        write_gguf(path, kind, layers, [int(size) for size in arguments[2:-1]])
        models.append(LlamaModel(package, path, threads))
    features = package.llama_print_system_info().decode()
    greeting = {"version": package.__version__, "features": features}
    sys.stdout.write(json.dumps(greeting) + "\n")
    sys.stdout.flush()
    random = np.random.default_rng(0)
    for line in sys.stdin:
        ids = random.integers(3, VOCABULARY, int(line)).tolist()
        sys.stdout.write(json.dumps([model.seconds(ids) for model in models]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
