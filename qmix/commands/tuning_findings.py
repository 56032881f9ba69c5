"""What `qmix doctor` says of tunings: which launches decode steps take on each GPU, and why.

Reads the user's file. Knows no torch.
"""

from collections.abc import Iterator

from qmix.commands.diagnosis import Facts, Finding
from qmix.errors import UsageError
from qmix.planning.machine import Gpu
from qmix.tuning import cache_file
from qmix.tuning.cache_file import Entry, SavedTunings, TuningKey
from qmix.tuning.switch import VARIABLE, is_wanted

_WHAT = "tuning"


def tunings(facts: Facts) -> Iterator[Finding]:
    """A finding for each GPU, or for the file that holds them all."""
    if not facts.gpus or facts.versions["triton"] is None:
        return
    try:
        wanted = is_wanted()
    except UsageError as error:  # it ends a load
        yield Finding(what=_WHAT, found=f"{error}", state="fails", remedy=f"Unset {VARIABLE}.")
        return
    if not wanted:
        yield Finding(what=_WHAT, found=f"the defaults, as {VARIABLE}=0 says")
        return
    saved = cache_file.load()
    if saved.trouble is not None:
        remedy = "qmix tune MODEL writes it again."
        yield Finding(what=_WHAT, found=saved.trouble, state="note", remedy=remedy)
        return
    for gpu in facts.gpus:
        yield _of(gpu, facts.versions["triton"], saved)


def _of(gpu: Gpu, triton: str, saved: SavedTunings) -> Finding:
    """What was found on a GPU with its present driver, compiler and kernels."""
    key = TuningKey(
        gpu=gpu.name,
        capability="{}.{}".format(*gpu.capability),
        driver=gpu.driver,
        triton=triton,
        kernels=cache_file.kernel_hash(),
        shapes="",
    )
    entries = [entry for entry in saved.entries if entry.key.is_of_same_card(key)]
    if entries:
        return Finding(what=_WHAT, found=f"{gpu.name}: {'; '.join(map(_said, entries))}")
    old = any(entry.key.gpu == gpu.name for entry in saved.entries)
    why = "only with another driver, Triton or qmix" if old else "not tuned yet"
    return Finding(
        what=_WHAT,
        found=f"{gpu.name}: {why}",
        state="note",
        remedy="The first reply searches for 20 s; qmix tune MODEL --full for minutes.",
    )


def _said(entry: Entry) -> str:
    gain = 100 * (1 - entry.microseconds / entry.untuned)
    ended = "" if entry.complete else ", ended early"
    return f"{gain:.1f} % faster ({entry.key.shapes}{ended})"
