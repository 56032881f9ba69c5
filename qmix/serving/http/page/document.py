"""The page's sources joined into one document, and the headers that go with it.

The policy lets a browser run this script and no other, and refuses every way from text to markup
(Trusted Types), so that nothing a model writes can become one.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from qmix.pages import theme

# Joined in this order into one module.
SCRIPTS = ("server.js", "tokens.js", "markdown.js", "experts.js", "slots.js", "chat.js")


@dataclass(frozen=True)
class Page:
    """What `/` answers."""

    html: bytes
    headers: Mapping[str, str]


@cache
def page() -> Page:
    """The page: the same bytes each time."""
    style = theme.stylesheet() + source("page.css")
    script = "\n".join(map(source, SCRIPTS))
    html = source("page.html").replace("/* style */", style).replace("/* script */", script)
    return Page(
        html.encode(),
        {
            "content-security-policy": "; ".join(_policy(style, script)),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cache-control": "no-cache",
        },
    )


def source(name: str) -> str:
    """A file of this folder."""
    return resources.files("qmix.serving.http.page").joinpath(name).read_text("utf-8")


def _policy(style: str, script: str) -> tuple[str, ...]:
    return (
        "default-src 'none'",
        f"script-src {_digest(script)}",
        f"style-src {_digest(style)}",
        "connect-src 'self'",
        "img-src data:",  # the icon, which is none
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
