"""StepTuning: how a decode step is launched, choices that only a card can make.

Knows no kernel. The defaults are reasoned, not measured. Every choice gives the same result, to the
same bits where it says so.
"""

from dataclasses import dataclass

from qmix.kernels.gpu import attention_tuning, grid


@dataclass(frozen=True, kw_only=True)
class StepTuning:
    """Settings of qmix.generation.static_decoder that only measurements can decide.

    Attributes:
        qkv, o_proj, gate_up, down: of the products, whose results differ in the last bits.
        attention: of attention, likewise.
        merge_in_split: the last split of a head merges the others; otherwise a launch of its own
            does, to the same bits.
        rotate_in_qkv: the last block of a head of q, k and v rotates it and writes the cache;
            otherwise a launch of its own does, to the same bits. Heads of 128 only.
        norm_in_products: o_proj and down add to the residual, and the next product divides by the
            root of the mean square; otherwise norms, residuals and the router are launches of their
            own. Goes with rotate_in_qkv only.
        split_gate: w1 and w3 are split along their inputs where whole ones would leave
            multiprocessors idle, and the last part adds them up; the order of the sum is another.
        dependent: of the launches that the last three make, attention and gate_up, each may start
            while the one before drains. From compute capability 9.0 on; elsewhere without effect.
        prefetch: such launches of q, k, v and o_proj ask the second-level cache for their weights
            before they wait.
    """

    qkv: grid.Tuning = grid.UNTUNED
    o_proj: grid.Tuning = grid.UNTUNED
    gate_up: grid.Tuning = grid.UNTUNED
    down: grid.Tuning = grid.UNTUNED
    attention: attention_tuning.Tuning = attention_tuning.UNTUNED
    merge_in_split: bool = True
    rotate_in_qkv: bool = True
    norm_in_products: bool = True
    split_gate: bool = True
    dependent: bool = False
    prefetch: bool = False


UNTUNED = StepTuning()
