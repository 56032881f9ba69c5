"""The steps of the acceptance command, the most valuable first, and how long each may take.

Knows the names of their modules; imports none of them, and no torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """A step of the command.

    Attributes:
        module: its module in qmix.evals.steps.
        seconds: after which the watchdog ends it.
        arguments: of the module's `results`, after the setting.
    """

    name: str
    module: str
    seconds: float
    arguments: Mapping[str, object] = field(default_factory=dict)
    needs_gpu: bool = True


def _model_steps(weights: str) -> Iterator[Step]:
    """The whole model: the first step builds it, those after it find it built.

    The first is untuned; then the launches of a row are tuned, and the others use what was found.
    """
    yield Step(
        f"{weights} tg64 untuned",
        "full_model",
        60,
        {"weights": weights, "kind": "tg", "tokens": 64},
    )
    yield Step(f"{weights} tuning", "step_search", 40, {"weights": weights, "rows": 1})
    tests: tuple[dict[str, object], ...] = (
        {"kind": "tg", "tokens": 64},
        {"kind": "tg", "tokens": 64, "temperature": 0.7},
        {"kind": "tg", "tokens": 64, "batch": 8},
        {"kind": "pp", "tokens": 4096},
        {"kind": "tg", "tokens": 64, "batch": 16},
        {"kind": "tg", "tokens": 64, "depth": 4096},
        {"kind": "pp", "tokens": 512},
        {"kind": "tg", "tokens": 64, "depth": 32768},
    )
    for test in tests:
        name = f"{weights} {test['kind']}{test['tokens']}"
        name += "".join(
            f" {key} {test[key]}" for key in ("temperature", "batch", "depth") if key in test
        )
        yield Step(name, "full_model", 25, {"weights": weights, **test})


def _peer_steps() -> Iterator[Step]:
    for peer in ("bitsandbytes", "int4pack", "gather", "grouped_nf4_gemm", "marlin"):
        yield Step(f"peer {peer}", "peers", 25, {"peer": peer})


# Measurements before tests: a wrong kernel shows in the perplexity of the tiny model, too.
STEPS = (
    Step("self-check", "self_checks", 60),
    Step("bandwidth", "bounds", 20, needs_gpu=False),
    *_model_steps("nf4"),
    Step("nf4 profile", "token_profile", 40, {"weights": "nf4"}),
    Step("nf4 slots", "serving_slots", 40, {"weights": "nf4"}),
    *_model_steps("int4"),
    Step("tiny perplexity", "tiny_perplexity", 40),
    Step("offload", "half_resident", 45),
    *_peer_steps(),
    Step("experts", "moe_block", 40),
    Step("group rounding", "group_rounding", 30),
    Step("tests", "gpu_tests", 150),
    Step("attention", "attention", 40),
    Step("int4 profile", "token_profile", 40, {"weights": "int4"}),
    Step("nf4 tuning 8 rows", "step_search", 40, {"weights": "nf4", "rows": 8}),
)


def step_named(name: str) -> Step:
    """The step of this name."""
    return next(step for step in STEPS if step.name == name)
