"""FP4: bitsandbytes' other 4-bit type, 4-bit floats in the layout of NF4. Read and kept, never chosen.

Knows nothing of files or of rounding.
"""

from dataclasses import dataclass, replace

from qmix.scheme import Scheme
from qmix.weights import NF4

# The value of each code: a sign, then 0, 1/16, 8, 12, 4, 6, 2, 3, all divided by 12 and in float32
# (bitsandbytes 0.50.2, functional.py, `get_4bit_type`). Minus zero is written as zero.
FP4_VALUES = (
    *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
    *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
    *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
    *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
)


@dataclass(frozen=True, eq=False)
class FP4(NF4):
    """A weight in 4-bit floats with one absmax per block: NF4's layout with `FP4_VALUES` as table."""

    @property
    def scheme(self) -> Scheme:
        return replace(super().scheme, kind="fp4")
