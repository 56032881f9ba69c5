"""How much work a calibrated quantization is, by arithmetic: for plans, reports and absent GPUs.

T are calibration tokens. Knows no torch, no files and no measurements.
"""

from dataclasses import dataclass, replace

from qmix.config import MixtralConfig

# The defaults of `qmix quantize`: windows of calibration text, positions a window, and the bytes of
# tokens from which on they are kept in files.
CALIBRATION_WINDOWS, CALIBRATION_POSITIONS = 256, 2048
ACTIVATION_BYTES = 4 << 30
GRADIENT_TOKENS = 65536  # at most, of the backward pass
# What an H100 SXM may reach: of its data sheet's 67 TFLOP/s of float32 60 %, of the 494 of
# TensorFloat-32 and the 989 of bfloat16 (dense) 40 %, and of 64 GB/s of PCIe a third.
GPU_FLOPS, GPU_TF32_FLOPS, GPU_BF16_FLOPS = 40e12, 200e12, 400e12
GPU_LINK, GPU_DISK = 20e9, 2e9  # bytes a second
GPU_LAUNCH_S = 6e-6
_GREEDY_LAUNCHES, _REFINE_LAUNCHES = 5, 6  # for each input
_OUTPUT_BLOCKS = 8  # in which the outputs of a matrix are rounded for the loss at the end


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


@dataclass(frozen=True)
class Work:
    """The work of one layer.

    Attributes:
        forward_flops: of forward passes, in bfloat16 on a GPU.
        moment_flops: of second moments, in TensorFloat-32 there.
        solve_flops: of factors and rounding, in float32.
        launches: kernels that a GPU starts, one for all experts' matrices of a kind.
        peak_bytes: of all arrays while a matrix is rounded, with one expert at a time.
        copied_bytes: of tokens that go to a GPU and back if its memory does not hold them.
        saved_bytes: of what is written after the layer, so that a run can be resumed.
    """

    forward_flops: float
    moment_flops: float
    solve_flops: float
    launches: int
    peak_bytes: int
    copied_bytes: int
    saved_bytes: int

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return self.forward_flops + self.moment_flops + self.solve_flops

    def gpu_seconds(self, layers: int, *, tokens_fit: bool = True) -> float:
        """On an H100, by arithmetic.

        Args:
            tokens_fit: whether its memory holds the tokens.
        """
        seconds = (
            self.forward_flops / GPU_BF16_FLOPS
            + self.moment_flops / GPU_TF32_FLOPS
            + self.solve_flops / GPU_FLOPS
            + self.launches * GPU_LAUNCH_S
            + self.saved_bytes / GPU_DISK
        )
        return layers * (seconds + (0 if tokens_fit else self.copied_bytes / GPU_LINK))


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
    return _with_gradients(each, config, tokens) if by_loss else each


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
        moment_flops += count * 2 * sums * inputs * square
        solve_flops += count * (columns**3 / 3 + solved * rows * square)
    attention = hidden * (2 * heads + narrow)
    expert = hidden * inner
    forward_flops = 2.0 * tokens * attention * (3 + sums)
    forward_flops += 2.0 * pairs * expert * (10 if correct else 5)
    columns = 2 * hidden + heads + inner
    launches = columns * (_GREEDY_LAUNCHES + _REFINE_LAUNCHES * refine)
    moments = 4 * inner * inner * (sums + 1)  # with the Cholesky factor
    state = (4 + 4 + 2 + 4) * inner * hidden  # targets, errors, codes, the weight
    rounded = 3 * experts * inner * hidden // 2  # the matrices of the layer, in 4 bits
    # Rows of tokens: read by three passes of attention, routing and the sum, and written; rows of
    # pairs: read twice for moments. With correction those of the unrounded model too.
    rows_moved = (15 if correct else 7) * tokens + (6 if correct else 2) * pairs
    return Work(
        forward_flops=forward_flops,
        moment_flops=moment_flops,
        solve_flops=solve_flops,
        launches=launches,
        peak_bytes=moments + state + rounded,
        copied_bytes=4 * hidden * rows_moved,
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
    moment_flops = 2.0 * passed * (qkv**2 + 2 * hidden**2) + 4.0 * pairs * inner**2
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
        launches=each.launches * _OUTPUT_BLOCKS,
        peak_bytes=max(each.peak_bytes + 12 * inner * hidden, matrix + rounded),
        saved_bytes=each.saved_bytes + 4 * passed * hidden + gradient_bytes(config),
    )
