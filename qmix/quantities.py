"""Numbers with their units, as people read them: sizes, rates, counts and durations.

Four digits, and the unit that leaves a number from 1 to 1000. Sizes in powers of two, which memory
comes in, are in qmix.planning.byte_sizes.
"""

_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_WORDS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))  # of numbers without a unit
_IRREGULAR = {
    "matrix": "matrices",
    "query": "queries",
    "miss": "misses",
    "copy": "copies",
    "reply": "replies",
}


def gigabytes(nbytes: float) -> str:
    """Bytes in powers of ten: "23.80 GB", "5.312 MB", "17 B"."""
    return _scaled(nbytes, "B", _DECIMAL)


def a_second(nbytes: float, seconds: float) -> str:
    """A rate: "1.204 GB/s". Nothing that took no time has one: "-"."""
    return f"{gigabytes(nbytes / seconds)}/s" if seconds > 0 else "-"


def amount(value: float, unit: str) -> str:
    """A value in powers of ten of a unit: "1.204 TFLOP"."""
    return _scaled(value, unit, _DECIMAL)


def weights(count: float) -> str:
    """A number of weights: "46.70 B", "1.307 M", "512"."""
    return _scaled(count, "", _WORDS)


def duration(seconds: float) -> str:
    """A time: "4 ms", "0.31 s", "42 s", "12 min", "1 h 05 min", "3 d 4 h"."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    if round(seconds) < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = round(minutes / 60)
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def counted(count: int, noun: str) -> str:
    """A number of things: "1 tensor", "2,048 tensors"."""
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """The plural of a noun, or of a phrase that ends in it."""
    *before, last = noun.split(" ")
    return " ".join((*before, _IRREGULAR.get(last, f"{last}s")))


def _scaled(value: float, unit: str, prefixes: tuple[tuple[float, str], ...]) -> str:
    for factor, prefix in prefixes:
        number = value / factor
        if abs(number) >= 0.99995:
            digits = max(0, 4 - len(str(int(float(f"{abs(number):.4g}")))))
            return f"{number:.{digits}f} {prefix}{unit}"
    small = f"{value:.0f}" if value == round(value) else f"{value:.3g}"
    return f"{small} {unit}".rstrip()
