"""How much work a calibrated quantization is, by arithmetic: for plans, reports and absent GPUs.

T are calibration tokens. Knows no torch, no files and no measurements.
"""

from dataclasses import dataclass, replace
from functools import partial

from qmix.config import MixtralConfig
from qmix.planning.rounding_cost import OUTPUT_BLOCKS, RoundingCost, solve_cost

# The defaults of `qmix quantize`: windows of calibration text, positions a window, and the bytes of
# tokens from which on they are kept in files.
CALIBRATION_WINDOWS, CALIBRATION_POSITIONS = 256, 2048
ACTIVATION_BYTES = 4 << 30
GRADIENT_TOKENS = 65536  # at most, of the backward pass
SYMMETRIC_PANEL = 1024  # columns of a symmetric sum that are multiplied at a time
# What an H100 SXM may reach: of its data sheet's 67 TFLOP/s of float32 60 %, of the 494 of
# TensorFloat-32 and the 989 of bfloat16 (dense) 40 %, and of 64 GB/s of PCIe a third.
GPU_FLOPS, GPU_TF32_FLOPS, GPU_BF16_FLOPS = 40e12, 200e12, 400e12
GPU_LINK, GPU_DISK = 20e9, 2e9  # bytes a second
HASHED = 1.8e9  # bytes a second of SHA-256 by one thread with SHA instructions
GPU_MEMORY = 80e9
# Of a layer on the host: its codes are packed and its errors summed, 6 s by one core, by 16.
_HOST_S = 0.4


def token_bytes(config: MixtralConfig, tokens: int, *, correct: bool = True) -> int:
    """Bytes of all float32 arrays [T, D] of calibration tokens that exist at once.

    Args:
        correct: as in `LayerOptions` of qmix.quantize: the exact activations are kept too.
    """
    # Before and after a layer; of the exact ones also the sum of the experts' outputs.
    arrays = 5 if correct else 2
    return 4 * tokens * config.hidden_size * arrays


def state_bytes(config: MixtralConfig, tokens: int) -> int:
    """Bytes of all bfloat16 arrays [T, D] that a backward pass keeps at once.

    They are the states before and after each layer, and one gradient.
    """
    return 2 * tokens * config.hidden_size * (config.num_hidden_layers + 2)


def gradient_bytes(config: MixtralConfig) -> int:
    """Bytes of the sums that a backward pass leaves of a layer."""
    return 4 * (_qkv_width(config) ** 2 + 2 * config.hidden_size**2)


def _qkv_width(config: MixtralConfig) -> int:
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim


def backward_bytes(config: MixtralConfig) -> int:
    """Bytes of a layer and of what autograd keeps of 2048 tokens, in float32."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim + _qkv_width(config)
    weights = hidden * heads + 3 * config.num_local_experts * hidden * inner
    kept = 2048 * (config.num_experts_per_tok * (5 * inner + 2 * hidden) + 8 * hidden + 2 * heads)
    return 4 * (weights + kept)


def expert_bytes(config: MixtralConfig, *, correct: bool = True, by_loss: bool = True) -> int:
    """The most that all arrays of an expert take while its matrices are rounded on a GPU."""
    hidden, inner = config.hidden_size, config.intermediate_size
    weights, wide = hidden * inner, inner * inner
    of_weights = 10 if by_loss else 8  # arrays of the size of the weights
    sums = 4 if correct else 3  # H, its factor, H again in the stack; the crossed sum
    outer = sums * wide + of_weights * weights
    joint = sums * hidden * hidden + 2 * of_weights * weights
    if by_loss:
        outer += hidden * hidden  # the factor of G
        # w1 and w3 apart have two of H each; the sums of slopes, which become the G, and factors.
        joint += sums * hidden * hidden + 4 * wide
    return 4 * max(outer, joint)


def symmetric_work(width: int) -> float:
    """FLOP of adding one input to a symmetric sum, which is multiplied down to its diagonal."""
    starts = range(0, width, SYMMETRIC_PANEL)
    return 2.0 * sum((width - start) * min(SYMMETRIC_PANEL, width - start) for start in starts)


@dataclass(frozen=True)
class Work:
    """The work of one layer.

    Attributes:
        forward_flops: of forward passes, in bfloat16 on a GPU.
        moment_flops: of second moments, in TensorFloat-32 there.
        solve_flops: of factors and rounding, in float32.
        rounding: what the solves take besides, with as many experts at once as 80 GB hold.
        peak_bytes: of all arrays while a matrix is rounded, with one expert at a time.
        copied_bytes: of tokens that go to a GPU and back if its memory does not hold them.
        source_bytes: of the layer's weights in 16 bits.
        readings: how often they are read and hashed, on a GPU.
        shard_bytes: of the layer's weights in 4 bits.
        gradient_bytes: that the backward pass writes.
        saved_bytes: of tokens that are written, as the shard, while the next layer is rounded.
    """

    forward_flops: float
    moment_flops: float
    solve_flops: float
    rounding: RoundingCost
    peak_bytes: int
    copied_bytes: int
    source_bytes: int
    readings: int
    shard_bytes: int
    gradient_bytes: int
    saved_bytes: int

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return self.forward_flops + self.moment_flops + self.solve_flops

    def gpu_terms(self, *, tokens_fit: bool = True) -> dict[str, float]:
        """Seconds of a layer on an H100, by arithmetic: they follow one another.

        Args:
            tokens_fit: whether its memory holds the tokens.
        """
        written = self.gradient_bytes
        written += 0 if tokens_fit else self.saved_bytes + self.shard_bytes
        return {
            "forward and backward passes": self.forward_flops / GPU_BF16_FLOPS,
            "second moments": self.moment_flops / GPU_TF32_FLOPS,
            "factors and rounding": self.solve_flops / GPU_FLOPS,
            "bytes of the matmuls between groups": self.rounding.memory_seconds,
            "kernels of groups": self.rounding.kernel_seconds,
            "launches": self.rounding.launch_seconds,
            "source, read and hashed": self.readings * self.source_bytes / HASHED,
            "files, hashed and written": written * (1 / GPU_DISK + 1 / HASHED),
            "packing on the host": _HOST_S,
            "tokens in host memory": 0.0 if tokens_fit else self.copied_bytes / GPU_LINK,
        }

    def gpu_seconds(self, layers: int, *, tokens_fit: bool = True) -> float:
        """On an H100, by arithmetic.

        The source is hashed before, as the disk gives it, and the shards after. A layer is
        written beside the next one, with tokens that fit, and that takes less time.
        """
        each = sum(self.gpu_terms(tokens_fit=tokens_fit).values())
        read = self.readings * self.source_bytes + self.shard_bytes + self.gradient_bytes
        disk = (read + self.saved_bytes) / GPU_DISK
        once = self.source_bytes / GPU_DISK + self.shard_bytes / HASHED
        return layers * (max(each, disk) + once)


def work(
    config: MixtralConfig,
    tokens: int,
    *,
    correct: bool = True,
    refine: int = 3,
    by_loss: bool = True,
) -> Work:
    """The arithmetic of `quantize.calibrated.layer` and `quantize.rounding.gptq`, term by term.

    Args:
        tokens: T. correct, refine: as in `LayerOptions` and `RoundingOptions` of qmix.quantize.
        by_loss: whether the objective is the loss at the end of the model.
    """
    each = _for_outputs(config, tokens, correct=correct, refine=refine)
    if not by_loss:
        return each
    rounding = _rounding(config, tokens, correct=correct, refine=refine, by_loss=True)
    return replace(_with_gradients(each, config, tokens), rounding=rounding)


def _rounding(
    config: MixtralConfig, tokens: int, *, correct: bool, refine: int, by_loss: bool
) -> RoundingCost:
    """What the solves of a layer take on a GPU of 80 GB that holds the tokens."""
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv, experts = _qkv_width(config), config.num_local_experts
    blocks = OUTPUT_BLOCKS if by_loss else 1
    solve = partial(solve_cost, refine=refine, blocks=blocks)
    cost = solve(hidden, qkv, 1, parts=3)
    cost += solve(config.num_attention_heads * config.head_dim, hidden, 1)
    free = GPU_MEMORY - token_bytes(config, tokens, correct=correct)
    step = int(0.8 * free / expert_bytes(config, correct=correct, by_loss=by_loss))
    step = min(experts, max(1, step))
    for first in range(0, experts, step):
        count = min(step, experts - first)
        if by_loss:  # w1 and w3 have gradients of their own
            cost += solve(hidden, inner, 2 * count)
        else:
            cost += solve(hidden, 2 * inner, count, parts=2)
        cost += solve(inner, hidden, count)
    return cost


def _for_outputs(config: MixtralConfig, tokens: int, *, correct: bool, refine: int) -> Work:
    """The work of keeping the outputs of each matrix."""
    hidden, inner, experts = (
        config.hidden_size,
        config.intermediate_size,
        config.num_local_experts,
    )
    heads = config.num_attention_heads * config.head_dim
    narrow = 2 * config.num_key_value_heads * config.head_dim
    pairs = tokens * config.num_experts_per_tok  # of a token and an expert
    sums = 2 if correct else 1
    matrices = (  # (count, tokens each, K, N)
        (1, tokens, hidden, heads + narrow),
        (1, tokens, heads, hidden),
        (experts, pairs / experts, hidden, 2 * inner),
        (experts, pairs / experts, inner, hidden),
    )
    moment_flops = solve_flops = 0.0
    for count, inputs, columns, rows in matrices:
        square = columns * columns
        solved = 1 + 2 * refine + (4 if correct else 0)
        crossed = 2.0 * square if correct else 0.0
        moment_flops += count * inputs * (symmetric_work(columns) + crossed)
        solve_flops += count * (columns**3 / 3 + solved * rows * square)
    attention = hidden * (2 * heads + narrow)
    expert = hidden * inner
    forward_flops = 2.0 * tokens * attention * (3 + sums)
    forward_flops += 2.0 * pairs * expert * (10 if correct else 5)
    moments = 4 * inner * inner * (sums + 1)  # with the Cholesky factor
    state = (4 + 4 + 2 + 4) * inner * hidden  # targets, errors, codes, the weight
    weights = attention + 3 * experts * expert
    # Rows of tokens: read by three passes of attention, routing and the sum, and written; rows of
    # pairs: read twice for moments. With correction those of the unrounded model too.
    rows_moved = (15 if correct else 7) * tokens + (6 if correct else 2) * pairs
    return Work(
        forward_flops=forward_flops,
        moment_flops=moment_flops,
        solve_flops=solve_flops,
        rounding=_rounding(config, tokens, correct=correct, refine=refine, by_loss=False),
        peak_bytes=moments + state + weights // 2,
        copied_bytes=4 * hidden * rows_moved,
        source_bytes=2 * weights,
        readings=1,
        shard_bytes=weights // 2,
        gradient_bytes=0,
        saved_bytes=4 * hidden * tokens * sums,
    )


def _with_gradients(each: Work, config: MixtralConfig, tokens: int) -> Work:
    """The same, and what the loss at the end of the model adds; see `qmix.quantize`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    experts, qkv = config.num_local_experts, _qkv_width(config)
    heads = config.num_attention_heads * config.head_dim
    pairs, passed = tokens * config.num_experts_per_tok, min(tokens, GRADIENT_TOKENS)
    # One pass forward, and one forward and back; w1 and w3 of each pair once more.
    layer = hidden * (heads + qkv) + config.num_experts_per_tok * 3 * hidden * inner
    forward_flops = 6.0 * passed * layer + 4.0 * pairs * hidden * inner
    moment_flops = passed * (symmetric_work(qkv) + 2 * symmetric_work(hidden))
    moment_flops += pairs * 2 * symmetric_work(inner)
    matrices = (  # (count, K, N)
        (1, hidden, qkv),
        (1, heads, hidden),
        (2 * experts, hidden, inner),
        (experts, inner, hidden),
    )
    factors = sum(count * (rows**3 / 3 + columns * rows**2) for count, columns, rows in matrices)
    # H of w1 and w3 twice, and the sum of gradients in front of w2.
    twice = experts * (hidden**3 / 3 + 2.0 * inner * hidden * (hidden + inner))
    # Of w1 and w3 those sums, a factor and a reordered sum, with targets and errors in turn.
    matrix = 4 * (4 * inner**2 + 6 * hidden**2) + 26 * inner * hidden
    rounded = 3 * experts * inner * hidden // 2
    return replace(
        each,
        forward_flops=each.forward_flops + forward_flops,
        moment_flops=each.moment_flops + moment_flops,
        solve_flops=each.solve_flops + factors + twice,
        peak_bytes=max(each.peak_bytes + 12 * inner * hidden, matrix + rounded),
        readings=each.readings + 2,
        gradient_bytes=4 * passed * hidden + gradient_bytes(config),
    )
