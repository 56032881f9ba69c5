"""What a model takes of each memory, line by line, by what will be done with it.

The experts' own line is the plan's; all the others follow from shapes. Knows no torch and no budget.
Shape letters: B rows, T tokens of a chunk, V vocabulary, D hidden width, F expert width, W windows, S
window.
"""

from dataclasses import dataclass

from qmix.config import MixtralConfig
from qmix.planning import quantize_cost
from qmix.planning.footprint import ITEM_BYTES, Footprint, Model

CPU_CHUNK, GPU_CHUNK = 512, 4096  # prompt tokens at a time (qmix.generation.loop)

# A process with torch loaded holds 227 MiB, 266 MiB after it ran the tiny model (torch 2.13, Linux);
# with CUDA's libraries about 2 GiB (assumed).
PROCESS_BYTES, CUDA_PROCESS_BYTES = 384 << 20, 2 << 30
# CUDA's own memory on the device, 300 to 500 MB by driver and card; and what fragments.
CUDA_CONTEXT_BYTES, RESERVE_BYTES = 512 << 20, 256 << 20
READ_BUFFERS = 2  # blobs beside those that are held, for reads under way
_TILE_BYTES = 64 << 20  # float32 tiles of the CPU's products, a few a thread
_GRAPH_BYTES = 64 << 20  # a CUDA graph's private pool


@dataclass(frozen=True)
class Line:
    """One entry of a bill; `standing`: there before anything is loaded, or kept free."""

    what: str
    nbytes: int
    standing: bool = False


@dataclass(frozen=True)
class Bill:
    """What a plan takes of one memory, in bytes."""

    lines: tuple[Line, ...] = ()

    @property
    def total(self) -> int:
        return sum(line.nbytes for line in self.lines)

    @property
    def loaded(self) -> int:
        """What is allocated by loading and running, beside what a process has anyway."""
        return sum(line.nbytes for line in self.lines if not line.standing)

    def __getitem__(self, what: str) -> int:
        return next((line.nbytes for line in self.lines if line.what == what), 0)

    def to_dict(self) -> dict[str, int]:
        return {line.what: line.nbytes for line in self.lines}


def _weights(model: Model, footprint: Footprint, context: int, batch: int) -> tuple[Line, ...]:
    kinds = footprint.kinds
    return (
        Line("attention", kinds.get("attention", 0)),
        Line("embeddings", kinds.get("embedding", 0)),
        Line("head", kinds.get("head", 0)),
        Line("router and norms", kinds.get("router", 0) + kinds.get("norm", 0)),
        Line("KV cache", model.kv_bytes(context, batch)),
    )


def of_device(model: Model, footprint: Footprint, context: int, batch: int) -> tuple[Line, ...]:
    """A GPU's bill without the experts."""
    return (
        *_weights(model, footprint, context, batch),
        Line("decode workspace", _decoding(model, batch)),
        Line("prefill workspace", _device_prefill(model, context, batch)),
        Line("CUDA context", CUDA_CONTEXT_BYTES, standing=True),
        Line("reserve", RESERVE_BYTES, standing=True),
    )


def beside_device(model: Model, footprint: Footprint) -> tuple[Line, ...]:
    """The host's bill where a GPU runs the model, without experts that stay there."""
    return (
        Line("scales as they were read", footprint.kept),
        Line("loading", max(model.loading, model.largest)),
        Line("process", CUDA_PROCESS_BYTES, standing=True),
    )


def of_host(model: Model, footprint: Footprint, context: int, batch: int) -> tuple[Line, ...]:
    """The host's bill where it runs the model itself, without the experts."""
    return (
        *_weights(model, footprint, context, batch),
        Line("workspace", max(_host_prefill(model, context, batch), model.loading)),
        Line("process", PROCESS_BYTES, standing=True),
    )


def of_scoring(model: Model, windows: int, window: int) -> Bill:
    """Host memory of `qmix eval`: one layer at a time and the hidden states of all windows [W, S, D]."""
    item, layers = ITEM_BYTES[model.dtype], model.config.num_hidden_layers
    sizes = [0] * layers
    ends = 0
    for weight in model.weights:
        if weight.tensor.layer is None:
            ends += weight.held(item)
        else:
            sizes[weight.tensor.layer] += weight.held(item)
    hidden = windows * window * model.config.hidden_size * item
    return Bill(
        (
            Line("one layer", max(sizes)),
            Line("embeddings and head", ends),
            Line("hidden states", hidden),
            Line("logits", 3 * 4 * window * model.config.vocab_size),
            Line("workspace", max(_host_prefill(model, 4096, 1), model.loading)),
            Line("process", PROCESS_BYTES, standing=True),
        )
    )


def of_rewriting(largest: int) -> Bill:
    """Host memory of what goes through a checkpoint weight by weight: nf4, rtn, convert, export.

    Args:
        largest: bytes of its largest tensor.

    Measured for NF4 of full width: 1,165 MiB with an embedding of 250 MiB as the largest tensor.
    """
    return Bill((Line("one weight", 3 * largest), Line("process", PROCESS_BYTES, standing=True)))


def of_calibration(config: MixtralConfig, tokens: int, in_memory: int) -> Bill:
    """Host memory of GPTQ: the arrays of one matrix, and `in_memory` bytes of tokens."""
    work = quantize_cost.work(config, tokens)
    return Bill(
        (
            Line("arrays of a matrix", work.peak_bytes),
            Line("calibration tokens", in_memory),
            Line("process", PROCESS_BYTES, standing=True),
        )
    )


def _decoding(model: Model, batch: int) -> int:
    """Rotary factors of every position, logits before and after the processors, shares."""
    config, item = model.config, ITEM_BYTES[model.dtype]
    rotary = 2 * (config.max_position_embeddings + 1) * config.head_dim * item
    logits = 4 * batch * config.vocab_size * 4
    wide = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    row = wide + config.hidden_size + config.num_experts_per_tok * config.intermediate_size
    return rotary + logits + 16 * batch * row * 4 + _GRAPH_BYTES


def _device_prefill(model: Model, context: int, batch: int) -> int:
    """Of a chunk: one expert dequantized, all its tokens' inner rows, shares of the sum; or, while
    loading, a layer's experts in the files' layout."""
    config, tokens, item = model.config, batch * min(GPU_CHUNK, context), 2
    hidden, inner = config.hidden_size, config.intermediate_size
    dequantized = 3 * hidden * inner * item
    rows = tokens * 3 * inner * item
    sums = tokens * hidden * (4 * config.num_experts_per_tok + 4 + 6 * item)
    return max(dequantized + rows + sums, model.first_layer)


def _host_prefill(model: Model, context: int, batch: int) -> int:
    """Of a chunk: float32 rows of one expert, a layer's mask, tiles, logits."""
    config, chunk = model.config, min(CPU_CHUNK, context)
    held = min(context, config.sliding_window or context) + chunk
    wide = config.num_attention_heads * config.head_dim
    row = 4 * (3 * config.intermediate_size + 8 * config.hidden_size + 4 * wide)
    mask = batch * chunk * held * 5  # as booleans, and added as floats
    return batch * chunk * row + mask + 3 * 4 * batch * config.vocab_size + _TILE_BYTES
