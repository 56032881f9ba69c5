"""The ways to quantize that the accuracy command compares: all methods, and GPTQ without its parts.

Knows the methods by their options only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from qmix.errors import UsageError
from qmix.quantize.calibrated.options import CalibratedOptions, LayerOptions
from qmix.quantize.calibrated.run import quantize_calibrated
from qmix.quantize.calibrated.windows import Calibration
from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint
from qmix.quantize.rounding.gptq import RoundingOptions
from qmix.quantize.source import open_source
from qmix.weights.scheme import Recipe, Scheme

GROUP_SIZES = (128, 32)

METHODS = {
    "rtn-g128": QuantizeRequest(method="rtn", group_size=128),
    "rtn-g32": QuantizeRequest(method="rtn", group_size=32),
    "nf4": QuantizeRequest(method="nf4"),
    "gptq-g128": QuantizeRequest(method="gptq", group_size=128, objective="loss"),
    "gptq-g128-layer": QuantizeRequest(method="gptq", group_size=128, objective="layer"),
    "gptq-g128-asymmetric": QuantizeRequest(
        method="gptq", group_size=128, asymmetric=True, objective="loss"
    ),
    "gptq-g32": QuantizeRequest(method="gptq", group_size=32, objective="loss"),
    "gptq-g32-layer": QuantizeRequest(method="gptq", group_size=32, objective="layer"),
    "auto-2.9": QuantizeRequest(method="auto", bits=2.9, objective="loss"),
    "auto-3": QuantizeRequest(method="auto", bits=3, objective="loss"),
    "auto-3.5": QuantizeRequest(method="auto", bits=3.5, objective="loss"),
    "auto-4.25": QuantizeRequest(method="auto", bits=4.25, objective="loss"),
    "auto-4.25-layer": QuantizeRequest(method="auto", bits=4.25, objective="layer"),
    "auto-4.5": QuantizeRequest(method="auto", bits=4.5, objective="loss"),
}
# What GPTQ is made of: each part is the option of its name. `PLAIN` is the paper's algorithm.
PARTS = {
    "loss": "objective",
    "weighting": "weighting",
    "correction": "correct",
    "act-order": "act_order",
    "live-scales": "live_scales",
    "scale-search": "scale_search",
    "trials": "trials",
    "refinement": "refine",
}
FULL = LayerOptions()
PLAIN = LayerOptions(
    objective="layer",
    weighting="none",
    correct=False,
    rounding=RoundingOptions(
        damping=0.01, act_order=False, live_scales=False, scale_search=False, trials=1, refine=0
    ),
)


def with_part_of(options: LayerOptions, part: str, other: LayerOptions) -> LayerOptions:
    """The options with one part as it is in `other`."""
    name = PARTS[part]
    if hasattr(other, name):
        return replace(options, **{name: getattr(other, name)})
    rounding = replace(options.rounding, **{name: getattr(other.rounding, name)})
    return replace(options, rounding=rounding)


def ablations() -> dict[str, LayerOptions]:
    """Each part left out of the whole and alone, and left out where the objective is a layer's."""
    layer = with_part_of(FULL, "loss", PLAIN)
    others = [part for part in PARTS if part != "loss"]
    return {
        "full": FULL,
        **{f"no-{part}": with_part_of(FULL, part, PLAIN) for part in others},
        "weighting-square": replace(FULL, weighting="square"),
        "layer": layer,
        **{f"layer-no-{part}": with_part_of(layer, part, PLAIN) for part in others},
        "plain": PLAIN,
        **{f"only-{part}": with_part_of(PLAIN, part, FULL) for part in PARTS},
    }


@dataclass(frozen=True)
class Variant:
    """A way to quantize; `write(source, out)` leaves a checkpoint at `out`."""

    name: str
    write: Callable[[Path, Path], object]


def method_variants(text: str, samples: int, seqlen: int) -> tuple[Variant, ...]:
    """Every method as `qmix quantize` runs it.

    Args:
        text: the calibration text.
        samples, seqlen: its windows, and the tokens of each.
    """

    def variant(name: str, request: QuantizeRequest) -> Variant:
        if request.calibrated:
            request = replace(request, samples=samples, seqlen=seqlen, device="cpu")
        return Variant(name, lambda source, out: quantize_checkpoint(source, out, request, text))

    return tuple(variant(name, request) for name, request in METHODS.items())


def ablated_variants(calibration: Calibration) -> tuple[Variant, ...]:
    """GPTQ at both group sizes, with one part after another left out, and alone."""

    def variant(group_size: int, name: str, layer: LayerOptions) -> Variant:
        recipe = Recipe.uniform(Scheme(kind="int4", group_size=group_size), attention=True)
        options = CalibratedOptions(layer=layer)
        return Variant(
            f"g{group_size}-{name}",
            lambda source, out: quantize_calibrated(
                open_source(source), out, recipe, calibration, options
            ),
        )

    return tuple(
        variant(group_size, name, layer)
        for group_size in GROUP_SIZES
        for name, layer in ablations().items()
    )


def matching(variants: Sequence[Variant], patterns: Sequence[str]) -> tuple[Variant, ...]:
    """The variants whose names match a pattern of file names; all of them without patterns.

    Raises:
        UsageError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch(variant.name, pattern) for variant in variants):
            raise UsageError(
                "no such row",
                where="--only",
                expected=", ".join(variant.name for variant in variants),
                found=pattern,
            )
    return tuple(
        variant
        for variant in variants
        if not patterns or any(fnmatch(variant.name, pattern) for pattern in patterns)
    )
