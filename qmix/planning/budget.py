"""What a model takes of each memory, item by item, for each thing that can be done with it.

The plan adds the item of the experts; all others follow from shapes. Knows no torch and no budget.
"""

from dataclasses import dataclass

from qmix.config import MixtralConfig
from qmix.planning import quantize_cost
from qmix.planning.footprint import Footprint
from qmix.planning.stored_model import StoredModel

# Prompt columns that generation computes at once: they bound the attention mask (chunk x context)
# and the activations of a long prompt. On a GPU a chunk of any length reads all experts, 24 GB for
# the 8x7B.
PREFILL_CHUNK, GPU_PREFILL_CHUNK = 512, 4096

# A process with torch loaded takes 227 MiB, and 266 MiB after it has run the tiny model (torch
# 2.13, Linux); with CUDA's libraries it takes about 2 GiB (assumed).
PROCESS_BYTES, CUDA_PROCESS_BYTES = 384 << 20, 2 << 30
# CUDA's own memory on the device, 300 to 500 MB depending on driver and GPU; and fragmentation.
CUDA_CONTEXT_BYTES, RESERVE_BYTES = 512 << 20, 256 << 20
READ_AHEAD = 3  # weights in memory, of a GPU's model pinned, while one of them is built
_TILE_BYTES = 64 << 20  # float32 tiles of the CPU's products, a few a thread
_GRAPH_BYTES = 64 << 20  # a CUDA graph's private pool


@dataclass(frozen=True)
class Item:
    """One item of a memory breakdown.

    Attributes:
        what: its name, as `qmix plan` prints it.
        standing: taken before anything is loaded, or kept free.
    """

    what: str
    nbytes: int
    standing: bool = False


@dataclass(frozen=True)
class MemoryBreakdown:
    """What a plan or a command takes of one memory, in bytes."""

    items: tuple[Item, ...] = ()

    @property
    def total(self) -> int:
        return sum(item.nbytes for item in self.items)

    @property
    def loaded(self) -> int:
        """Bytes that loading and running allocate, without what is standing."""
        return sum(item.nbytes for item in self.items if not item.standing)

    def __getitem__(self, what: str) -> int:
        return next((item.nbytes for item in self.items if item.what == what), 0)

    def times(self, processes: int) -> "MemoryBreakdown":
        """What as many processes take, of which one stands."""
        return MemoryBreakdown(
            tuple(
                Item(item.what, item.nbytes * (1 if item.standing else processes), item.standing)
                for item in self.items
            )
        )

    def to_dict(self) -> dict[str, int]:
        return {item.what: item.nbytes for item in self.items}


def _weights(
    model: StoredModel, footprint: Footprint, context: int, batch: int
) -> tuple[Item, ...]:
    kinds = footprint.kinds
    return (
        Item("attention", kinds.get("attention", 0)),
        Item("embeddings", kinds.get("embedding", 0)),
        Item("head", kinds.get("head", 0)),
        Item("router and norms", kinds.get("router", 0) + kinds.get("norm", 0)),
        Item("KV cache", model.kv_bytes(context, batch)),
    )


def device_items(
    model: StoredModel, footprint: Footprint, context: int, batch: int
) -> tuple[Item, ...]:
    """What a GPU holds, without the experts."""
    return (
        *_weights(model, footprint, context, batch),
        Item("decode workspace", _decoding(model, batch)),
        Item("prefill workspace", _device_prefill(model, context, batch)),
        Item("CUDA context", CUDA_CONTEXT_BYTES, standing=True),
        Item("reserve", RESERVE_BYTES, standing=True),
    )


def host_items_beside_device(model: StoredModel, footprint: Footprint) -> tuple[Item, ...]:
    """What the host holds while a GPU runs the model, without the experts that stay on the host."""
    return (
        Item("scales as they were read", footprint.host_bytes),
        Item("loading", model.loading + READ_AHEAD * model.largest),
        Item("process", CUDA_PROCESS_BYTES, standing=True),
    )


def host_items(
    model: StoredModel, footprint: Footprint, context: int, batch: int
) -> tuple[Item, ...]:
    """What the host holds if it runs the model itself, without the experts."""
    return (
        *_weights(model, footprint, context, batch),
        Item("workspace", max(_host_prefill(model, context, batch), model.loading)),
        Item("process", PROCESS_BYTES, standing=True),
    )


def for_scoring(model: StoredModel, windows: int, window: int) -> MemoryBreakdown:
    """The host memory of `qmix eval`: a layer at a time, and the hidden states of all windows,
    [windows, window, D].
    """
    item, layers = model.item, model.config.num_hidden_layers
    sizes = [0] * layers
    ends = 0
    for weight in model.weights:
        if weight.tensor.layer is None:
            ends += weight.memory_bytes(item)
        else:
            sizes[weight.tensor.layer] += weight.memory_bytes(item)
    hidden = windows * window * model.config.hidden_size * item
    return MemoryBreakdown(
        (
            Item("one layer", max(sizes)),
            Item("embeddings and head", ends),
            Item("hidden states", hidden),
            Item("logits", 3 * 4 * window * model.config.vocab_size),
            Item("workspace", max(_host_prefill(model, 4096, 1), model.loading)),
            Item("process", PROCESS_BYTES, standing=True),
        )
    )


def for_rewriting(largest: int) -> MemoryBreakdown:
    """The host memory of commands that rewrite a checkpoint weight by weight: nf4, rtn, convert,
    export.

    NF4 at full width took 1,165 MiB, with an embedding of 250 MiB as the largest tensor.

    Args:
        largest: bytes of the checkpoint's largest tensor.
    """
    return MemoryBreakdown(
        (Item("one weight", 3 * largest), Item("process", PROCESS_BYTES, standing=True))
    )


def for_backward(config: MixtralConfig, in_memory: int) -> MemoryBreakdown:
    """The host memory of a backward pass through one layer after another."""
    return MemoryBreakdown(
        (
            Item("a layer and its gradients", quantize_cost.backward_bytes(config)),
            Item("hidden states", in_memory),
            Item("process", PROCESS_BYTES, standing=True),
        )
    )


def for_calibration(
    config: MixtralConfig, tokens: int, in_memory: int, *, by_loss: bool = True
) -> MemoryBreakdown:
    """The host memory of GPTQ: the arrays of one matrix, and `in_memory` bytes of tokens."""
    work = quantize_cost.work(config, tokens, by_loss=by_loss)
    return MemoryBreakdown(
        (
            Item("arrays of a matrix", work.peak_bytes),
            Item("calibration tokens", in_memory),
            Item("process", PROCESS_BYTES, standing=True),
        )
    )


def _decoding(model: StoredModel, batch: int) -> int:
    """Rotary factors of every position, logits before and after the processors, partial sums."""
    config, item = model.config, model.item
    rotary = 2 * (config.max_position_embeddings + 1) * config.head_dim * item
    logits = 4 * batch * config.vocab_size * 4
    wide = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    row = wide + config.hidden_size + config.num_experts_per_tok * config.intermediate_size
    return rotary + logits + 16 * batch * row * 4 + _GRAPH_BYTES


def _device_prefill(model: StoredModel, context: int, batch: int) -> int:
    """A prompt chunk's workspace: one dequantized expert, the inner activations of all tokens, and
    partial sums. While loading, a layer's experts in the layout of the files, if that is more.
    """
    config, tokens, item = model.config, batch * min(GPU_PREFILL_CHUNK, context), 2
    hidden, inner = config.hidden_size, config.intermediate_size
    dequantized = 3 * hidden * inner * item
    rows = tokens * 2 * inner * item  # one expert may take them all; SiLU is computed in place
    sums = tokens * hidden * (4 * config.num_experts_per_tok + 4 + 6 * item)
    return max(dequantized + rows + sums, model.first_layer)


def _host_prefill(model: StoredModel, context: int, batch: int) -> int:
    """A prompt chunk's workspace: float32 activations, a mask, tiles and logits.

    The activations are those of two experts that take all tokens (gate, up, the copied inputs, and
    one's inputs as the kernels arrange them), or those of attention, if they are more.
    """
    config, chunk = model.config, min(PREFILL_CHUNK, context)
    columns = min(context, config.sliding_window or context) + chunk
    wide = config.num_attention_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    row = 4 * max(5 * (inner + hidden), 8 * hidden + 4 * wide)
    mask = batch * chunk * columns * 5  # as booleans, and as the floats that are added
    return batch * chunk * row + mask + 3 * 4 * batch * config.vocab_size + _TILE_BYTES
