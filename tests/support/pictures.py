"""Draw the pictures of the documentation: a chat and a plan in a terminal, and the rooms.

    python -m tests.support.pictures        # writes docs/chat.svg, plan.svg and rooms.svg

The commands run in a terminal of their own, on the tiny Mixtral in 4 bits and on the 8x7B's
config.json. tests/test_docs.py compares the words of the pictures with what is printed today.
"""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

from qmix.config import MixtralConfig
from qmix.kernels.cpu.library import library
from tests.support import house
from tests.support.house import ROOT

DOCS = ROOT / "docs"
PROMPT = ">>> "
_LIMIT_S = 100
# The line editor asks for marked pastes while it draws; what it draws is not replayed.
_EDITOR_OPENS, _EDITOR_CLOSES = "\x1b[?2004h", "\x1b[?2004l"
_MOVES = re.compile(r"(\n|\r|\x1b\[1A|\x1b\[2K)")
_ESCAPES = re.compile(r"\x1b\[\?\d+[hl]|\x1b\][^\x07]*\x07|\x1b[=>]")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One command in a terminal of `width` columns.

    Attributes:
        lines: typed, each at a prompt.
        ready: what stands there before the first one is.
    """

    title: str
    command: str
    width: int
    lines: tuple[str, ...] = ()
    ready: str = ""


# Greedy and in float32: the same words on every processor and number of threads.
CHAT = Scene(
    title="qmix chat",
    command="qmix chat tiny-nf4 --temperature 0 --dtype float32",
    width=84,
    lines=("What does os.path.join do?", "How do I open a file?", "/exit"),
    ready="context 1,024",
)
PLAN = Scene(
    title="qmix plan",
    command="qmix plan Mixtral-8x7B-v0.1 --card 3090 --ram 64G",
    width=106,
)


def chat(tiny_nf4: Path) -> str:
    """A chat with the tiny model in 4 bits, as SVG."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "tiny-nf4").symlink_to(tiny_nf4)
        return _svg(CHAT, Path(scratch), "chat")


def plan() -> str:
    """A plan for Mixtral-8x7B on a card of 24 GB, before any download, as SVG."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "Mixtral-8x7B-v0.1"
        folder.mkdir()
        MixtralConfig(max_position_embeddings=32768).save_pretrained(folder)
        return _svg(PLAN, Path(scratch), "plan")


def _svg(scene: Scene, folder: Path, name: str) -> str:
    """The scene as rich draws a terminal, without fonts from the network."""
    console = Console(
        record=True,
        width=scene.width,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    console.print(Text("$ ", style="bold green") + Text(scene.command, style="bold"))
    console.print(Text.from_ansi(played(scene, folder)), end="")
    svg = console.export_svg(title=scene.title, theme=DIMMED_MONOKAI, unique_id=name)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def played(scene: Scene, folder: Path) -> str:
    """All that the terminal showed of a command that ran in `folder`.

    Raises:
        RuntimeError: it failed, or took longer than `_LIMIT_S`.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, scene.width, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "qmix.cli", *scene.command.split()[1:]],
        cwd=folder,
        env=_environment(folder),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        shown = "".join(_seen(ours, scene))
        if child.wait(timeout=_LIMIT_S):
            raise RuntimeError(f"{scene.command} failed:\n{shown}")
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    return _without_erased(shown.replace("\r\n", "\n"))


def _without_erased(shown: str) -> str:
    """The lines that stand at the end: progress bars are erased, line by line."""
    lines, at = [""], 0
    for part in _MOVES.split(shown):
        if part == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif part == "\x1b[1A":
            at -= 1
        elif part == "\x1b[2K":
            lines[at] = ""
        elif part != "\r":
            lines[at] += part
    return "\n".join(lines)


def _environment(folder: Path) -> Mapping[str, str]:
    """Of the user's settings, only what finds the compiled kernels: no history, no overrides."""
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "XDG_CACHE_HOME") if name in os.environ
    }
    hidden = {"XDG_STATE_HOME": str(folder / "state"), "PYTHONUTF8": "1"}
    return {**kept, **hidden, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}


def _seen(terminal: int, scene: Scene) -> Iterator[str]:
    """What comes out of the terminal, but for the line editor's drawing, which it erases itself.

    At each prompt the next line is typed.
    """
    deadline, waiting, left = time.monotonic() + _LIMIT_S, "", list(scene.lines)
    is_ready = not scene.ready
    while True:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"nothing came within {_LIMIT_S} s after: {waiting[-200:]!r}")
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # Linux: the other side has closed
            data = b""
        if not data:
            yield _ESCAPES.sub("", waiting)
            return
        waiting += data.decode("utf-8", "replace")
        while _EDITOR_CLOSES in waiting:
            before, _, drawn = waiting.partition(_EDITOR_OPENS)
            drawn, _, waiting = drawn.partition(_EDITOR_CLOSES)
            shown = before if PROMPT.strip() in drawn else before + drawn
            is_ready |= scene.ready in shown
            yield _ESCAPES.sub("", shown)
        before, _, drawn = waiting.partition(_EDITOR_OPENS)
        is_ready |= scene.ready in before
        if is_ready and left and PROMPT.strip() in drawn:
            yield _ESCAPES.sub("", before)
            os.write(terminal, f"{left.pop(0)}\n".encode())
            waiting = _after(_EDITOR_CLOSES, terminal, deadline)


def _after(mark: str, terminal: int, deadline: float) -> str:
    """What comes out of the terminal behind a mark."""
    seen = ""
    while mark not in seen:
        if not select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]:
            raise RuntimeError(f"{mark!r} did not come after: {seen[-200:]!r}")
        seen += os.read(terminal, 1 << 16).decode("utf-8", "replace")
    return seen.partition(mark)[2]


def words(svg: str) -> str:
    """The text of a picture, line by line."""
    lines: dict[float, list[tuple[float, str]]] = {}
    for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        at = float(element.get("y", "0")), float(element.get("x", "0"))
        lines.setdefault(at[0], []).append((at[1], element.text or ""))
    shown = ("".join(part for _, part in sorted(lines[y])) for y in sorted(lines))
    return "".join(shown).replace("\xa0", " ")


_BOX, _STEP, _WIDTH, _MARGIN = (140, 30), 54, 760, 24


def rooms() -> str:
    """The rooms on their floors as SVG; an arrow leads from a room to one that it imports.

    Arrows that follow from others are left out: a room may import whatever it can reach.
    """
    arrows = sorted(_essential(house.survey().arrows))
    at = _places(arrows)
    height = _STEP * len(house.FLOORS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="14" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#789"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#fff"/>',
    ]
    parts += [
        f'<path d="{_way(at[here], at[there])}" fill="none" stroke="#789" stroke-width="1.5" '
        'marker-end="url(#tip)"/>'
        for here, there in arrows
    ]
    for name, (x, y) in at.items():
        parts.append(
            f'<rect x="{x - _BOX[0] // 2}" y="{y - _BOX[1] // 2}" width="{_BOX[0]}" '
            f'height="{_BOX[1]}" rx="6" fill="#eef3f8" stroke="#456"/>'
            f'<text x="{x}" y="{y + 5}" fill="#123">{name.removeprefix("qmix.")}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _places(arrows: Sequence[tuple[str, str]]) -> Mapping[str, tuple[int, int]]:
    """The middle of every room's box; a floor is in the order of the rooms that import it."""
    at: dict[str, tuple[int, int]] = {}

    def above(name: str) -> float:
        importers = [at[here][0] for here, there in arrows if there == name and here in at]
        return sum(importers) / len(importers) if importers else _WIDTH

    for number, names in enumerate(reversed(house.FLOORS)):
        for index, name in enumerate(sorted(names, key=above)):
            x = _WIDTH * (2 * index + 1) // (2 * len(names))
            at[name] = x, _STEP * number + _STEP // 2
    return at


def _way(start: tuple[int, int], end: tuple[int, int]) -> str:
    """An arrow's path: down, sideways on one floor, along the margin past three floors or more."""
    (x, y), (to_x, to_y) = start, end
    side = _BOX[0] // 2 if to_x > x else -_BOX[0] // 2
    if y == to_y:
        return f"M{x + side} {y}H{to_x - side}"
    if to_y - y < 3 * _STEP:
        y, to_y = y + _BOX[1] // 2, to_y - _BOX[1] // 2
        return f"M{x} {y}C{x} {y + 30} {to_x} {to_y - 30} {to_x} {to_y}"
    margin = _WIDTH - _MARGIN if side > 0 else _MARGIN
    return f"M{x + side} {y}C{margin} {y} {margin} {to_y} {to_x + side} {to_y}"


def _essential(arrows: frozenset[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Arrows that no longer way replaces."""
    below: dict[str, set[str]] = {}
    for here, there in arrows:
        below.setdefault(here, set()).add(there)

    @cache
    def reached(name: str) -> set[str]:
        return below.get(name, set()).union(*(reached(one) for one in below.get(name, set())))

    for here, there in arrows:
        if not any(there in reached(one) for one in below[here] - {there}):
            yield here, there


def main() -> None:
    library()  # compiled before the first reply, which would show it as a wait
    with tempfile.TemporaryDirectory() as scratch:
        tiny_nf4 = Path(scratch) / "tiny-nf4"
        command = ["qmix.cli", "quantize", str(ROOT / "evals" / "tiny"), str(tiny_nf4)]
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
        DOCS.mkdir(exist_ok=True)
        for name, svg in (("chat", chat(tiny_nf4)), ("plan", plan()), ("rooms", rooms())):
            (DOCS / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
