"""How much work a calibrated quantization is, by arithmetic: for plans, reports and absent GPUs.

T are calibration tokens. Knows no torch, no files and no measurements.
"""

from dataclasses import dataclass

from qmix.config import MixtralConfig

# The defaults of `qmix quantize`: windows of calibration text, positions a window, and the bytes of
# tokens from which on they are kept in files.
CALIBRATION_WINDOWS, CALIBRATION_POSITIONS = 256, 2048
ACTIVATION_BYTES = 4 << 30
# 60 % of what a large GPU does without tensor cores (H100 SXM: 67 TFLOP/s by its data sheet).
GPU_FLOPS = 40e12
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


@dataclass(frozen=True)
class Work:
    """The work of one layer.

    Attributes:
        flops: multiplications and additions.
        launches: kernels that a GPU starts, one for all experts' matrices of a kind.
        peak_bytes: of all arrays while w2 is rounded, with one expert at a time.
    """

    flops: float
    launches: int
    peak_bytes: int

    def gpu_seconds(self, layers: int) -> float:
        """At GPU_FLOPS and GPU_LAUNCH_S."""
        return layers * (self.flops / GPU_FLOPS + self.launches * GPU_LAUNCH_S)


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
    flops = 0.0
    for count, inputs, columns, rows in matrices:
        square = columns * columns
        solved = 1 + 2 * refine + (4 if correct else 0)
        flops += count * (2 * sums * inputs * square + columns**3 / 3 + solved * rows * square)
    attention = hidden * (2 * heads + narrow)
    flops += 2 * tokens * attention * (3 + sums)
    expert = hidden * inner
    flops += 2 * pairs * expert * (10 if correct else 5)
    columns = 2 * hidden + heads + inner
    launches = columns * (_GREEDY_LAUNCHES + _REFINE_LAUNCHES * refine)
    moments = 4 * inner * inner * (sums + 1)  # with the Cholesky factor
    state = (4 + 4 + 2 + 4) * inner * hidden  # targets, errors, codes, the weight
    rounded = 3 * experts * inner * hidden // 2  # the matrices of the layer, in 4 bits
    return Work(flops, launches, moments + state + rounded)
