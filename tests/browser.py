"""A headless browser, driven by its debugging pipe as by a person with mouse, keys and fingers."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
if BROWSER is None and os.environ.get("DINO_KIT_BROWSER") == "required":
    raise RuntimeError(
        "DINO_KIT_BROWSER is \"required\", and neither chromium nor google-chrome is installed."
    )
in_a_browser = pytest.mark.skipif(
    BROWSER is None or os.name != "posix", reason="no chromium or google-chrome is installed"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# The browser reads from descriptor 3 and writes to 4.
START = (
    "import os, sys; [os.dup2(int(fd), n, True) for n, fd in zip((3, 4), sys.argv[1:])];"
    "os.execv(sys.argv[3], sys.argv[3:])"
)
CODES = {"Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
         "ArrowDown": 40}  # fmt: skip


class Browser:
    """One tab. ``faults`` are the errors that its pages met; ``profile`` is a folder of its own."""

    def __init__(self, profile: Path):
        import fcntl  # Windows has none

        ours, theirs = os.pipe(), os.pipe()
        # Above 4, so that neither is in the other's way.
        given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (ours[0], theirs[1])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, given), BROWSER, *FLAGS,
             f"--user-data-dir={profile}"],
            pass_fds=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (ours[0], theirs[1], *given):
            os.close(fd)
        self.write, self.read, self.buffer = ours[1], theirs[0], b""
        self.sent, self.session, self.faults = 0, None, []

    def attach(self):
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def close(self):
        self.session = None
        try:
            self.send("Browser.close")
            self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self.write)
            os.close(self.read)

    def send(self, method: str, **parameters) -> dict:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.message()).get("id") != self.sent:
            self.note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def message(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], 120)[0], "the browser is silent"
            received = os.read(self.read, 1 << 20)
            assert received, "the browser has ended"
            self.buffer += received
        text, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(text)

    def note(self, event: dict):
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.faults.append(parameters["exceptionDetails"])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.faults.append(parameters["entry"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.faults.append(parameters["args"])

    def open(self, path: Path, ready: str):
        """Show a page, and return when the condition ``ready`` holds in it."""
        self.send("Page.navigate", url=path.as_uri())
        self.until(f"document.readyState === 'complete' && {ready}")

    def js(self, expression: str):
        """The value of ``expression``, awaited."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, condition: str):
        """Return when ``condition`` holds."""
        self.js(f"""new Promise((done, failed) => {{
            let rounds = 0;
            const look = () => ({condition}) ? done() : ++rounds < 3000 ? setTimeout(look, 20)
                : failed(new Error("it never came to be"));
            look();
        }})""")

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({selector!r}).textContent")

    def box(self, selector: str) -> list[float]:
        return self.js(
            f"(() => {{ const it = document.querySelector({selector!r});"
            "it.scrollIntoView({block: 'center'}); const box = it.getBoundingClientRect();"
            "return [box.left, box.top, box.width, box.height]; })()"
        )

    def mouse(self, kind: str, selector: str, across: float = 0.5, down: float = 0.5):
        left, top, width, height = self.box(selector)
        self.send(
            "Input.dispatchMouseEvent", type=kind, x=left + across * width, y=top + down * height,
            button="none" if kind == "mouseMoved" else "left", clickCount=1,
        )  # fmt: skip

    def click(self, selector: str, across: float = 0.5, down: float = 0.5):
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, selector, across, down)

    def press(self, *keys: str):
        for key in keys:
            code = CODES.get(key) or ord(key.upper())
            for kind in ("rawKeyDown", "keyUp"):
                self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def focus(self, selector: str):
        self.js(f"document.querySelector({selector!r}).focus()")

    def canvas(self, selector: str) -> np.ndarray:
        """A canvas' pixels (h, w, 4)."""
        height, width, values = self.js(
            f"(() => {{ const it = document.querySelector({selector!r});"
            "const all = it.getContext('2d').getImageData(0, 0, it.width, it.height).data;"
            "return [it.height, it.width, Array.from(all)]; })()"
        )
        return np.array(values, "u1").reshape(height, width, 4)
