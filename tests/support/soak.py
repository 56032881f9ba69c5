"""What `make test` leaves to `make soak`: most cases of a large grid, and most drawn examples.

SOAK_SEED chooses the order of a soak and what it draws; after SOAK_MINUTES no test begins any more.
A soak begins one test of each function before the second of any, so that a short one tries all.
"""

import math
import os
import random
import time
from collections import Counter, defaultdict
from itertools import product

import pytest

try:  # tests of kernels run on machines with a GPU and little else
    from hypothesis import HealthCheck, settings
except ImportError:
    settings = None
else:
    # Busy machines are slow: no time is a failure. The gate draws the same examples in every run.
    _SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("gate", max_examples=40, derandomize=True, database=None, **_SETTINGS)
    settings.register_profile("soak", max_examples=500, print_blob=True, **_SETTINGS)
    settings.load_profile("gate")

SEED = int(os.environ.get("SOAK_SEED") or "0")


both = pytest.mark.parametrize("soak", [False, pytest.param(True, marks=pytest.mark.soak)])


def soaking():
    return settings is not None and settings.get_current_profile_name() == "soak"


def begin():
    """Set the time at which a soak of SOAK_MINUTES ends, for all its workers."""
    minutes = os.environ.get("SOAK_MINUTES")
    if minutes:
        os.environ["SOAK_ENDS"] = str(time.time() + 60 * float(minutes))


def is_over():
    """Whether a soak has used its minutes."""
    return soaking() and time.time() > float(os.environ.get("SOAK_ENDS", "inf"))


def seconds_left():
    """Until a soak has used its minutes; infinite without an end."""
    return float(os.environ.get("SOAK_ENDS", "inf")) - time.time() if soaking() else math.inf


def tries(count):
    """The numbers of a campaign's cases, from 0; a soak that has used its minutes ends it early."""
    for number in range(count):
        if number and is_over():
            return
        yield number


def examples(count, **options):
    """Hypothesis settings for an expensive property: `count` examples, in a soak ten times that."""
    return settings(max_examples=count * (10 if soaking() else 1), **options)


def one_in(every, values):
    """Parameters of which all but each `every`th are left to the soak."""
    return [
        value if number % every == 0 else pytest.param(value, marks=pytest.mark.soak)
        for number, value in enumerate(values)
    ]


def grid(every, *axes):
    """The product of axes; all but each `every`th of its points are left to the soak."""
    return [
        pytest.param(*point, marks=[pytest.mark.soak] if number % every else [])
        for number, point in enumerate(product(*axes))
    ]


def gate_and_soak(gate, soak):
    """Parameters (*value, False) of the suite, and (*value, True) that are left to the soak."""
    return [
        *((*value, False) for value in gate),
        *(pytest.param(*value, True, marks=pytest.mark.soak) for value in soak),
    ]


def line(reports):
    """What campaigns tried and what came of it, in one line; None if none ran.

    Every test has recorded its counts as the property "counted": "cases", and what became of them.
    """
    total = Counter()
    for report in reports:
        for name, counts in getattr(report, "user_properties", ()):
            if name == "counted":
                total.update(counts)
    if not total:
        return None
    cases = total.pop("cases")
    told = ", ".join(f"{count} {name}" for name, count in sorted(total.items()))
    return f"campaigns: seed {SEED}, {cases} cases: {told}"


def leave_to_soak(items):
    """Mark with `soak` what only a soak runs: whatever lies off the diagonal of a marked grid.

    In a soak every property runs again, with the soak's examples, and the seed chooses the order.
    """
    if soaking():
        random.Random(SEED).shuffle(items)
        ranks = Counter()
        items.sort(key=lambda item: _next_rank(ranks, item))
    grids = defaultdict(list)
    for item in items:
        if item.get_closest_marker("diagonal"):
            grids[item.parent.nodeid, item.originalname].append(item)
        if soaking() and getattr(item.obj, "is_hypothesis_test", False):
            item.add_marker(pytest.mark.soak)
    for grid in grids.values():
        kept = _diagonal([item.callspec.params for item in grid])
        for number, item in enumerate(grid):
            if number not in kept:
                item.add_marker(pytest.mark.soak)


def _next_rank(ranks, item):
    """How many tests of the same function came before."""
    function = item.parent.nodeid, getattr(item, "originalname", item.name)
    ranks[function] += 1
    return ranks[function]


def _diagonal(cases):
    """The places of cases that have every value of every parameter between them."""
    values = {name: list({id(case[name]): None for case in cases}) for name in cases[0]}
    places = [{name: values[name].index(id(case[name])) for name in case} for case in cases]
    kept, seen = set(), set()
    for step in range(max(map(len, values.values()))):
        wanted = {name: step % len(found) for name, found in values.items()}
        kept |= {number for number, place in enumerate(places) if place == wanted}
    for number in sorted(kept):
        seen |= places[number].items()
    for number, place in enumerate(places):  # a grid with holes has none on some steps
        if not place.items() <= seen:
            kept.add(number)
            seen |= place.items()
    return kept
