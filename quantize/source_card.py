"""What the model card of a source says of its license, read without trusting the card.

A card begins with YAML between two lines of `---`. YAML's aliases can make a small file a large
document, so no YAML is parsed: three fields are looked for, each alone on its line and of a strict
form. Whatever is of another form is left out.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from qmix.errors import CheckpointError
from qmix.files import regular_file
from qmix.formats.files import manifest

_HEAD_BYTES = 64 << 10  # of the card: the YAML of real ones is shorter
# Identifiers as the hub lists them, names, and links of the web.
_LICENSE = re.compile(r"""license:\s+(["']?)([a-z0-9][a-z0-9.+-]{0,63})\1\s*(?:#.*)?""")
_NAME = re.compile(r"""license_name:\s+(["']?)([A-Za-z0-9][A-Za-z0-9._+-]{0,95})\1\s*(?:#.*)?""")
_LINK = re.compile(
    r"""license_link:\s+(["']?)(https://[A-Za-z0-9._~/%#?&=+-]{1,300})\1\s*(?:\s#.*)?"""
)


@dataclass(frozen=True)
class License:
    """A license as a card states it.

    Attributes:
        identifier: the hub's, such as `apache-2.0`, or `other`.
        name, link: of a license that the hub does not list.
    """

    identifier: str
    name: str | None = None
    link: str | None = None


def stated_license(source: Path) -> License | None:
    """The license that the card in a folder states; None if there is no card, or none in it."""
    lines = _front_matter(source / manifest.CARD)
    found = {
        field: next((match[2] for line in lines if (match := pattern.fullmatch(line))), None)
        for field, pattern in (("license", _LICENSE), ("name", _NAME), ("link", _LINK))
    }
    if found["license"] is None:
        return None
    return License(found["license"], found["name"], found["link"])


def _front_matter(path: Path) -> list[str]:
    """The lines of a card's YAML; none if it has no YAML, is no file, or cannot be read."""
    if not regular_file.exists(path):
        return []
    try:
        with regular_file.open_regular(path) as file:
            text = file.read(_HEAD_BYTES).decode("utf-8", "replace")
    except CheckpointError:
        return []  # a card that cannot be read says nothing of the weights
    first, *lines = text.removeprefix("\ufeff").splitlines() or [""]
    if first.rstrip() != "---" or "---" not in (ends := [line.rstrip() for line in lines]):
        return []
    return ends[: ends.index("---")]
