"""Mistakes that a check of the compiled kernels has to find: a table of changes to their PTX.

Each entry changes the places of a kernel's text that a pattern matches, one at a time. Most changes
are wrong wherever they are made. Some are none at some places: the compiler sets barriers that no
exchange needs, and masks of lanes that no small problem reaches. Of those some must be caught.

    python -m tests.support.ptx.mutations    counts them
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qmix.kernels.gpu.grid import Tuning
from tests.support.ptx import cases
from tests.support.ptx.device import Device, installed
from tests.support.ptx.errors import PtxError

ALL, SOME = "all", "some"


@dataclass(frozen=True)
class Mutation:
    """A mistake.

    Attributes:
        pattern, replacement: as of re.sub.
        caught: ALL, or SOME where it is no mistake at some places.
    """

    name: str
    pattern: str
    replacement: str | Callable[[re.Match], str]
    caught: str = ALL

    def texts(self, text, most):
        """The text with the change at one place, for up to `most` places."""
        matches = list(re.finditer(self.pattern, text))
        for match in matches[:: max(1, -(-len(matches) // most))]:
            new = (
                match.expand(self.replacement)
                if isinstance(self.replacement, str)
                else self.replacement(match)
            )
            yield text[: match.start()] + new + text[match.end() :]


def _number(change):
    """The match's first group, then its second as a number that is changed."""
    return lambda match: f"{match[1]}{change(int(match[2]))}"


_REGISTERS = r"(%r\d+), (%r\d+)"
_COPY = r"cp\.async\.\w+\.shared\.global"

# Of every kernel with a loop over tiles.
COPIES = (
    Mutation("a wait left out", r"cp\.async\.wait_group\s+\d+;", "", SOME),
    Mutation(
        "a wait for one group less",
        r"(cp\.async\.wait_group\s+)(\d+)",
        _number(lambda n: n + 1),
        SOME,
    ),
    Mutation("a group not committed", r"cp\.async\.commit_group;", "", SOME),
    Mutation("a copy to the next place", rf"({_COPY} \[ %r\d+ \+ )(0)", r"\g<1>16", SOME),
    Mutation("a copy of the next row", rf"({_COPY} \[.*?\], \[ %rd\d+ \+ )(0)", r"\g<1>64", SOME),
    Mutation(
        "a copy that is not aligned", rf"({_COPY} \[.*?\], \[ %rd\d+ \+ )(0)", r"\g<1>2", SOME
    ),
)
BARRIERS = (Mutation("a barrier left out", r"bar\.sync\s+0;", "", SOME),)
MATRICES = (
    Mutation("rows of A swapped", rf"(mma\.\S+ \{{.*?\}}, \{{ ){_REGISTERS}", r"\1\3, \2"),
    Mutation(
        "halves of B swapped", rf"(mma\.\S+ \{{.*?\}}, \{{.*?\}}, \{{ ){_REGISTERS}", r"\1\3, \2"
    ),
    Mutation(
        "halves of A's inputs swapped",
        rf"(mma\.\S+ \{{.*?\}}, \{{ ){_REGISTERS}, {_REGISTERS}",
        r"\1\4, \5, \2, \3",
    ),
    Mutation("tiles swapped", rf"(ldmatrix\S+ \{{){_REGISTERS}", r"\1\3, \2"),
    Mutation(
        "a tile transposed", r"(ldmatrix\.sync\.aligned\.m8n8\.x4)(?!\.trans)", r"\1.trans", ALL
    ),
    Mutation("a tile not transposed", r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1"),
)
COLUMNS = (Mutation("columns of the sum swapped", rf"(mma\.\S+ \{{ ){_REGISTERS}", r"\1\3, \2"),)
NF4 = (
    Mutation("nibbles swapped", r"(prmt\.b32 %r\d+, l, h, 0x)6240", r"\g<1>7351"),
    Mutation("bytes of a value swapped", r"(prmt\.b32 %r\d+, l, h, 0x)6240", r"\g<1>2604"),
    Mutation("planes swapped", r"(prmt\.b32 %r\d+, )l, h", r"\1h, l"),
    Mutation("the table's upper half unused", r"xor\.b32 (\w), \1, x;", r"mov.b32 \1, \1;"),
    Mutation("the wrong half of the table", r"0x88888888", "0x88888808"),
    Mutation("the second pair of bytes", r"(shr\.b32 s, %r\d+, )16", r"\g<1>8"),
    Mutation(
        "an entry of the table", r"(prmt\.b32 h, %r\d+, 0x)(\w)", lambda m: m[1] + "37"[m[2] == "3"]
    ),
)
INT4 = (
    Mutation("nibbles swapped", r"0x000f000f", "0x00f000f0"),
    Mutation("bits of a code lost", r"0x00f000f0", "0x00700070"),
    Mutation("the logic of lop3", r"(lop3\.b32 .*, )0xea", r"\g<1>0xe8"),
    Mutation("the constant that is subtracted", r"0xe408e408", "0xe409e409"),
    Mutation("the other constant", r"0xd480d480", "0xd480d481"),
    Mutation("the pair of bytes", r"0x4140", "0x4342"),
)
INT8 = (
    Mutation("a byte of the next code", r"0x7150", "0x7151"),
    Mutation("the upper byte of 1024 lost", r"0x7352", "0x7342"),
    Mutation("the pair of bytes", r"0x7352", "0x7150"),
    Mutation("the constant that is subtracted", r"0xe480e480", "0xe481e480"),
)
SLICES = (
    Mutation("the lower bits of the next code", r"0x00030003", "0x000c000c"),
    Mutation("the upper bit of the next code", r"0x00100010", "0x00080008"),
    Mutation("bits of a code lost", r"0x00c000c0", "0x00400040"),
    Mutation("the logic of lop3", r"(lop3\.b32 .*, )0xea", r"\g<1>0xe8"),
    Mutation("a rotation", r"(shf\.r\.wrap\.b32 .*, )(\d+);", lambda m: f"{m[1]}{int(m[2]) ^ 1};"),
    Mutation("the constant that is subtracted", r"0xdc10dc10", "0xdc11dc11"),
    Mutation("the constant of one code", r"0xcd00cd00", "0xcd01cd00"),
)
ANY_TABLE = (
    *NF4[:3],
    Mutation("the top bit of a code lost", r"0x44444444", "0x44444404"),
    Mutation("the lower bits of a code", r"0x77777777", "0x77777737"),
    Mutation("another code's value", r"0x32103210", "0x32113210"),
    Mutation("the halves of a table", r"(prmt\.b32 (\w), )\2, x, t", r"\1x, \2, t"),
)
GROUPS = (
    Mutation("a scale left out", r"mul\.f16(\s+%rs\d+, %rs\d+), %rs\d+;", r"mov.b16\1;"),
    Mutation(
        "the scale of another group",
        r"(ld\.shared\.b32\s+%r\d+, \[%r\d+\+)(\d+)",
        _number(lambda n: n + 256),
        SOME,
    ),
)
PLACES = (
    Mutation("axes of the grid", r"%ctaid\.x", "%ctaid.z"),
    Mutation("a store to the next place", r"(st\.global\S* \[ ?%rd\d+ ?\+ ?)0", r"\g<1>16", SOME),
    Mutation(
        "a load of the next place",
        r"(ld\.global\S*\s+\{[^}]*\}, \[ ?%rd\d+ ?\+ ?)0",
        r"\g<1>16",
        SOME,
    ),
    Mutation("exchanged at another place", r"(st\.shared\S* \[ ?%r\d+ ?\+ ?)0", r"\g<1>16", SOME),
    Mutation("a lane's bits", r"(and\.b32\s+%r\d+, %r\d+, )(\d+)", _number(lambda n: n >> 1), SOME),
    Mutation("a distance", r"(shl\.b32\s+%r\d+, %r\d+, )(\d+)", _number(lambda n: n + 1), SOME),
)
BOUNDS = (Mutation("one more than the bound", r"setp\.lt\.s", "setp.le.s", SOME),)
REDUCTIONS = (
    Mutation(
        "another lane",
        r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )(\d+)",
        _number(lambda n: n ^ 24),
        SOME,
    ),
    Mutation("an exponential left out", r"ex2\.approx(?:\.ftz)?", "neg", SOME),
    Mutation("a sign", r"\bsub\.f32", "add.f32", SOME),
)
ARRIVALS = (
    Mutation("counted before all stored", r"bar\.sync\s+0;(?=((?!bar\.sync)[\s\S])*?atom\.)", ""),
    Mutation("not counted", r"acq_rel\.add", "acq_rel.min"),
)
LOOP = (*COPIES, *BARRIERS, *MATRICES)


@dataclass(frozen=True)
class Campaign:
    """A kernel in a case, and mistakes to be made in it."""

    case: Callable[[], list[cases.Result]]
    kernel: str
    mutations: tuple[Mutation, ...]


def _linear(weights):
    return lambda: cases.linear(weights, 8, (128, 384))


def _experts():
    return cases.experts("nf4", 8, 128, 128)


def _fused():
    """Every product in splits."""
    tuning = Tuning(warps_per_sm=64)
    return cases.fused_layer("nf4", torch.float16, 1, 640, 640, tuning)


CAMPAIGNS = {
    "matmul nf4": Campaign(_linear("nf4"), "packed_matmul", (*LOOP, *COLUMNS, *NF4, *PLACES)),
    "matmul int4": Campaign(
        _linear("int4 asymmetric g64"), "packed_matmul", (*LOOP, *COLUMNS, *INT4)
    ),
    "matmul int8": Campaign(_linear("int8 asymmetric"), "packed_matmul", (*LOOP, *INT8)),
    "matmul int3": Campaign(_linear("int3 g128"), "packed_matmul", (*LOOP, *COLUMNS, *SLICES)),
    "matmul of a table": Campaign(_linear("own table"), "packed_matmul", ANY_TABLE),
    "matmul in groups of 16": Campaign(
        _linear("int6 nested g16"), "packed_matmul", (*COLUMNS, *INT8, *GROUPS)
    ),
    "gate_up": Campaign(_experts, "gate_up", (*LOOP, *NF4, *REDUCTIONS)),
    "down": Campaign(_experts, "down", (*LOOP, *COLUMNS, *NF4, *PLACES)),
    "combine": Campaign(lambda: cases.linear("nf4", 8, (640, 128)), "combine", (*PLACES, *BOUNDS)),
    "dequantize": Campaign(
        lambda: cases.dequantize("nf4"), "dequantize", (*NF4, *PLACES, *BARRIERS)
    ),
    "split": Campaign(
        lambda: cases.attend(torch.float16, 1, arrivals=True),
        "split",
        (*LOOP, *COLUMNS, *REDUCTIONS, *PLACES, *ARRIVALS),
    ),
    "merge": Campaign(lambda: cases.attend(torch.float16, 1), "merge", (*REDUCTIONS, *PLACES)),
    "prefill": Campaign(
        lambda: cases.attend(torch.bfloat16, 40, window=20),
        "prefill",
        (*LOOP, *COLUMNS, *REDUCTIONS, *PLACES),
    ),
    "norms": Campaign(
        lambda: cases.norms(torch.bfloat16, 8),
        "residual_norm",
        (*BARRIERS, *REDUCTIONS[:2], *PLACES, *BOUNDS),
    ),
    "rotary": Campaign(lambda: cases.rotary(torch.float16, 40), "rotate_store", PLACES),
    "qkv with rotary": Campaign(_fused, "matmul_rotate_store", ARRIVALS),
    "o_proj with router": Campaign(_fused, "matmul_add_route", ARRIVALS),
    "down with norm": Campaign(_fused, "down_add", ARRIVALS),
}


def run(campaign, most):
    """(mutation, how each of up to `most` places was caught; None where it was not)."""
    texts = {}

    def keep(name, text):
        if name == campaign.kernel:
            texts[text] = True
        return text

    with installed(Device(keep)):
        assert all(result.is_right() for result in campaign.case())
    for mutation in campaign.mutations:
        found = [
            _outcome(campaign.case, text, new)
            for text in texts
            for new in mutation.texts(text, most)
        ]
        if found:
            yield mutation, found


def _outcome(case, text, new):
    """How the mistake showed: the error's name, or "wrong"; None if it did not."""
    try:
        with installed(Device(lambda name, given: new if given == text else given)):
            results = case()
    except PtxError as error:
        return type(error).__name__
    except AssertionError:  # a counter that is not zero again
        return "wrong"
    return None if all(result.is_right() for result in results) else "wrong"


def missed(mutation, found):
    """Whether a mutation that has to be caught was not."""
    return None in found if mutation.caught == ALL else set(found) == {None}


def main():
    """Print how every mutation was caught; the exit code is 1 if one was missed."""
    torch.set_deterministic_debug_mode("error")  # what a kernel does not write is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    total, wrong = Counter(), 0
    for name, campaign in CAMPAIGNS.items():
        for mutation, found in run(campaign, 6):
            total.update(map(str, found))
            wrong += missed(mutation, found)
            counts = ", ".join(f"{how} {n}" for how, n in Counter(map(str, found)).items())
            mark = "MISSED  " if missed(mutation, found) else ""
            print(f"{mark}{name}: {mutation.name}: {counts}", flush=True)
    print(dict(total))
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
