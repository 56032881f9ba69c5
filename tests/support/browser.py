"""A headless Chromium, driven over its DevTools protocol by pipes: no driver, no websocket.

Clicks and keys go through the browser's own input, so that what a person could not reach fails.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.process import PATIENCE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "End": ("End", 35, ""),
}
SHIFT = 8


def program():
    """Where the browser lies; None: there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser.

    Attributes:
        problems: what the page's console reports: exceptions, and what its policy refused.
    """

    def __init__(self, commands, answers):
        self._commands, self._answers = commands, answers
        self._read, self._serial, self._session = b"", 0, None
        self.problems = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method, **parameters):
        """The result of a command of the protocol."""
        self._serial += 1
        asked = {"id": self._serial, "method": method, "params": parameters}
        if self._session is not None:
            asked["sessionId"] = self._session
        os.write(self._commands, json.dumps(asked).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._serial:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(answer["params"])

    def _next(self):
        while b"\0" not in self._read:
            assert select.select([self._answers], [], [], PATIENCE)[0], "the browser hangs"
            part = os.read(self._answers, 1 << 16)
            assert part, "the browser is gone"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression):
        """The value of an expression in the page."""
        result = self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression):
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, (
                expression,
                self.evaluate("document.body.innerText"),
            )
            time.sleep(0.05)
        return value

    def open(self, url):
        """Go to an address, and wait until its page is there."""
        self.command("Page.navigate", url=url)
        self.until(
            f"location.href.startsWith({json.dumps(url)}) && document.readyState == 'complete'"
        )

    def text(self, selector):
        """What an element shows."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def accessible(self):
        """What a screen reader is given: (role, name) of each node."""
        nodes = self.command("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def _middle(self, selector):
        """The point in the middle of an element, which must be the topmost thing there."""
        x, y, topmost = self.evaluate(
            f"""(() => {{
                const found = document.querySelector({json.dumps(selector)});
                found.scrollIntoView({{block: "nearest", behavior: "instant"}});
                const box = found.getClientRects()[0];
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                return [x, y, found.contains(document.elementFromPoint(x, y))];
            }})()"""
        )
        assert topmost, f"{selector} cannot be clicked"
        return x, y

    def hover(self, selector):
        x, y = self._middle(selector)
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector):
        x, y = self._middle(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def key(self, name, modifiers=0):
        code, number, text = KEYS[name]
        which = {"key": name, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        self.command("Input.dispatchKeyEvent", type="keyDown", text=text, **which)
        self.command("Input.dispatchKeyEvent", type="keyUp", **which)

    def type(self, text):
        """Type into what has the focus."""
        self.command("Input.insertText", text=text)

    def resize(self, width, height):
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def scheme(self, name):
        """Prefer light or dark."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.command("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, path):
        """Write what is seen as PNG."""
        Path(path).write_bytes(base64.b64decode(self.command("Page.captureScreenshot")["data"]))


@contextmanager
def opened(width=1400, height=900):
    """A browser with an empty profile, which is gone at the end."""
    ends = [*os.pipe(), *os.pipe()]
    # Above what the child gets: 3 are its commands, 4 its answers.
    to_child, commands, answers, from_child = (
        fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends
    )
    for end in ends:
        os.close(end)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = (
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--disable-extensions"),
            *("--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars"),
        )
        null = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
        child = os.posix_spawn(
            program(),
            [program(), *arguments],
            {**os.environ, "HOME": profile},
            file_actions=[
                *(null, (os.POSIX_SPAWN_DUP2, 1, 2)),
                (os.POSIX_SPAWN_DUP2, to_child, 3),
                (os.POSIX_SPAWN_DUP2, from_child, 4),
            ],
            setpgroup=0,
        )
        os.close(to_child)
        os.close(from_child)
        try:
            browser = Browser(commands, answers)
            browser.resize(width, height)
            yield browser
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(commands)
            os.close(answers)
