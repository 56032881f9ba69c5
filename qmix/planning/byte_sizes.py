"""Sizes in bytes, and numbers of tokens, as people write them."""

from qmix.errors import UsageError

# A "24 GB" GPU has 24 GiB, so a bare letter is binary, as in every tool that starts containers. A
# unit that ends in B means exactly what it says: powers of ten, or of two with an i.
_UNITS = {
    "": 1,
    "B": 1,
    **{letter: 2 ** (10 * power) for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 2 ** (10 * power) for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}B": 10 ** (3 * power) for power, letter in enumerate("KMGT", 1)},
}
_LARGEST = 1 << 50


def parse_size(size: str | int, *, where: str, least: int = 0, most: int = _LARGEST) -> int:
    """Bytes of "24G", "24GiB" (2^30 each), "16GB" (10^9), "500MB", "1.5T" or a number.

    Args:
        where: the option, for errors.
        least, most: accepted bytes.

    Raises:
        UsageError: not a size, or out of range.
    """
    text = str(size).strip()
    digits = text.rstrip("BbIiKkMmGgTt ")
    unit = text[len(digits) :].strip().upper()
    if unit in _UNITS and digits.isascii() and digits.replace(".", "", 1).isdigit():
        nbytes = float(digits) * _UNITS[unit]
        if least <= nbytes <= most:
            return int(nbytes)
        raise UsageError(
            "a size out of range",
            where=where,
            expected=f"{show(least)} to {show(most)}",
            found=text[:80],
        )
    raise UsageError(
        "not a size", where=where, expected="a size such as 24G, 500MB or 1.5TiB", found=text[:80]
    )


def parse_count(text: str | int, *, where: str) -> int:
    """A number of tokens: 32768, or "32k" and "32K", which are the same.

    Raises:
        UsageError: not a whole number.
    """
    written = str(text).strip()
    digits = written.rstrip("kKmM")
    factor = {"": 1, "k": 1 << 10, "m": 1 << 20}.get(written[len(digits) :].lower())
    if factor and len(digits) < 16 and digits.isascii() and digits.replace(".", "", 1).isdigit():
        count = float(digits) * factor
        if count.is_integer():
            return int(count)
    raise UsageError(
        "not a number of tokens",
        where=where,
        expected="a whole number such as 4096, 8k or 32K",
        found=written[:80],
    )


def show(nbytes: float) -> str:
    """The size in the largest binary unit that leaves a number of at least 1."""
    if abs(nbytes) < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if abs(nbytes) < 1024 or unit == "GiB":
            break
    return f"{nbytes:.2f} {unit}"


def as_option(nbytes: int) -> str:
    """The size as an option takes it, rounded up to a tenth of a GiB, or of a MiB below 1 GiB."""
    unit, name = (1 << 30, "G") if nbytes >= 1 << 30 else (1 << 20, "M")
    return f"{-(-nbytes * 10 // unit) / 10:.1f}{name}"
