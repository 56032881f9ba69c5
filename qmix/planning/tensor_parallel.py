"""What each of several equal GPUs takes when a server splits a model over them by its heads.

The arithmetic of vLLM 0.33 and SGLang 0.5.23 (models/mixtral.py of both): experts and attention are
split evenly, keys and values by their heads, embedding and head by the vocabulary; router and norms
are on every GPU. Knows no torch and no files.
"""

from dataclasses import dataclass

from qmix.errors import UnsupportedError
from qmix.planning.budget import Item, MemoryBreakdown
from qmix.planning.stored_model import StoredModel, StoredWeight

# CUDA's context, NCCL's buffers, activations and recorded graphs: about what both servers leave
# free by default on a GPU of 24 GB and more. Assumed, not measured here.
SERVER_BYTES = 2 << 30
_VOCABULARY_ROWS = 64  # to whose multiple both pad a GPU's share of the embedding


@dataclass(frozen=True, kw_only=True)
class GpuShare:
    """What one GPU of a group takes.

    Attributes:
        gpus: that share the model.
        memory: weights, keys and values, and what the server takes.
        position_bytes: keys and values of one position.
    """

    gpus: int
    memory: MemoryBreakdown
    position_bytes: int

    def positions(self, budget: int) -> int:
        """Positions of all requests together that a budget in bytes holds; 0 if it is too small."""
        fixed = self.memory.total - self.memory["keys and values"]
        return max(0, budget - fixed) // self.position_bytes


def share(model: StoredModel, gpus: int, context: int, batch: int = 1) -> GpuShare:
    """Split a model over GPUs.

    Args:
        gpus: a power of two, as the heads are.
        context: positions of each of `batch` requests.

    Raises:
        UnsupportedError: the model cannot be split so.
    """
    config = model.config
    _check_split(model, gpus)
    kv_heads = max(1, config.num_key_value_heads // gpus)
    kinds = {"expert": 0, "attention": 0, "embedding": 0, "shared": 0}
    for weight in model.weights:
        kind, nbytes = _share_of(weight, gpus, kv_heads, config.num_key_value_heads)
        kinds[kind] += nbytes
    position = 2 * kv_heads * config.head_dim * config.num_hidden_layers * model.item
    positions = batch * min(context, config.sliding_window or context)
    return GpuShare(
        gpus=gpus,
        position_bytes=position,
        memory=MemoryBreakdown(
            (
                Item("experts", kinds["expert"]),
                Item("attention", kinds["attention"]),
                Item("embedding and head", kinds["embedding"]),
                Item("router and norms", kinds["shared"]),
                Item("keys and values", positions * position),
                Item("the server, assumed", SERVER_BYTES, standing=True),
            )
        ),
    )


def _share_of(weight: StoredWeight, gpus: int, kv_heads: int, all_kv_heads: int) -> tuple[str, int]:
    """(the item, the bytes) of one GPU's part of a weight."""
    tensor = weight.tensor
    if tensor.kind in ("embedding", "head"):
        rows, _ = tensor.shape
        padded = -(-rows // (_VOCABULARY_ROWS * gpus)) * _VOCABULARY_ROWS
        return "embedding", -(-weight.file_bytes * padded // rows)
    if tensor.kind == "attention":
        if tensor.prefix.endswith((".k_proj", ".v_proj")):
            return "attention", weight.file_bytes * kv_heads // all_kv_heads
        return "attention", weight.file_bytes // gpus
    if tensor.kind == "expert":
        return "expert", weight.file_bytes // gpus
    return "shared", weight.file_bytes


def _check_split(model: StoredModel, gpus: int) -> None:
    """Raise unless heads and groups can be dealt evenly."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = {w.scheme.group_size for w in model.weights if w.scheme.integer}
    group = max((*sizes, 1))  # -1, all inputs, is no group to keep whole
    problem = None
    if heads % gpus:
        problem = f"{heads} heads"
    elif kv_heads % gpus and gpus % kv_heads:
        problem = f"{kv_heads} heads of keys and values"
    elif config.intermediate_size % (gpus * group):
        problem = f"{config.intermediate_size} inputs of w2 in groups of {group}"
    if problem is not None:
        raise UnsupportedError(
            "the model cannot be split over so many GPUs",
            where="--tp",
            expected=f"a number that divides {problem}",
            found=gpus,
        )
