"""How much work a calibrated quantization is, by arithmetic: for plans, reports and absent GPUs.

T are calibration tokens. Knows no torch, no files and no measurements.
"""

from dataclasses import dataclass

from qmix.config import MixtralConfig

# The defaults of `qmix quantize`: windows of calibration text, positions a window, and the bytes of
# tokens from which on they are kept in files.
CALIBRATION_WINDOWS, CALIBRATION_POSITIONS = 256, 2048
ACTIVATION_BYTES = 4 << 30
# What an H100 SXM may reach: of its data sheet's 67 TFLOP/s of float32 60 %, of the 494 of
# TensorFloat-32 and the 989 of bfloat16 (dense) 40 %, and of 64 GB/s of PCIe a third.
GPU_FLOPS, GPU_TF32_FLOPS, GPU_BF16_FLOPS = 40e12, 200e12, 400e12
GPU_LINK, GPU_DISK = 20e9, 2e9  # bytes a second
GPU_LAUNCH_S = 6e-6
_GREEDY_LAUNCHES, _REFINE_LAUNCHES = 8, 6  # for each input


def token_bytes(config: MixtralConfig, tokens: int, *, correct: bool = True) -> int:
    """Bytes of all float32 arrays [T, D] of calibration tokens that exist at once.

    Args:
        correct: as in `LayerOptions` of qmix.quantize: the exact activations are kept too.
    """
    # Before and after a layer; of the exact ones also the sum of the experts' outputs.
    arrays = 5 if correct else 2
    return 4 * tokens * config.hidden_size * arrays


def backward_bytes(config: MixtralConfig) -> int:
    """Bytes of a layer and of what autograd keeps of 2048 tokens, in float32."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
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
        peak_bytes: of all arrays while w2 is rounded, with one expert at a time.
        copied_bytes: of tokens that go to a GPU and back if its memory does not hold them.
        saved_bytes: of tokens that are written after the layer, so that a run can be resumed.
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


def work(config: MixtralConfig, tokens: int, *, correct: bool = True, refine: int = 3) -> Work:
    """The arithmetic of `quantize.calibrated.layer` and `quantize.rounding.gptq`, term by term.

    Args:
        tokens: T. correct, refine: as in `LayerOptions` and `RoundingOptions` of qmix.quantize.
    """
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
