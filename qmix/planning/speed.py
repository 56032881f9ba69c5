"""How fast a plan decodes: the bound of each way to serve misses, and the share of it to expect.

Pure arithmetic over a plan and rates.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from qmix.planning import roofline
from qmix.planning.plan import Plan
from qmix.planning.roofline import DecodePath, Rates

_RATES: dict[DecodePath, tuple[str, ...]] = {
    "resident": ("device",),
    "interconnect": ("device", "interconnect"),
    "cpu": ("device", "host"),
    "host": ("host",),
    "host and disk": ("host", "disk"),
}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Decoded tokens a second of all rows together, for one way to serve misses.

    Attributes:
        path: where the experts come from that the fastest memory does not hold.
        bound: with an empty cache. bound_full: with the planned context in the cache.
        expected: `share` of the bound, until it has been measured.
    """

    path: DecodePath
    bound: float
    bound_full: float
    expected: float
    share: float


def speeds(planned: Plan, rates: Rates) -> Iterator[Speed]:
    """One for each way in which the plan can serve misses."""
    cache = planned.model.kv_bytes(planned.context, planned.batch)
    empty = planned.step_cost
    full = replace(empty, dense=empty.dense + cache)
    for path in _paths(planned):
        bound = planned.batch / empty.seconds(path, rates)
        yield Speed(
            path=path,
            bound=bound,
            bound_full=planned.batch / full.seconds(path, rates),
            expected=roofline.SHARE[path] * bound,
            share=roofline.SHARE[path],
        )


def fastest(planned: Plan, rates: Rates) -> Speed:
    """The better way to serve misses."""
    return max(speeds(planned, rates), key=lambda speed: speed.expected)


def rates_used(of: Iterable[Speed]) -> tuple[str, ...]:
    """The names of the rates that any of these speeds depends on."""
    return tuple(dict.fromkeys(name for speed in of for name in _RATES[speed.path]))


def figure(value: float) -> str:
    """Two or three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _paths(planned: Plan) -> tuple[DecodePath, ...]:
    if not planned.gpu:
        return ("host",) if planned.resident else ("host and disk",)
    return ("resident",) if planned.resident else ("interconnect", "cpu")
