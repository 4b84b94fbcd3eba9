"""Headless Chromium, driven through its DevTools protocol over two pipes as by a visitor."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--hide-scrollbars",
    "--enable-precise-memory-info",
    "--remote-debugging-pipe",
]
PATIENCE = 60  # seconds until something that a visitor waits for counts as never


class Browser:
    """A running browser; send() calls a method, and events holds the events since."""

    def __init__(self, to_browser: int, from_browser: int):
        self._out, self._in, self._rest = to_browser, from_browser, b""
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._out, content) :]
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], PATIENCE)[0], "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has gone"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser with an empty profile; it reads from its file descriptor 3 and writes to 4."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        ends = []
        for end in (*os.pipe(), *os.pipe()):
            ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))  # not 3 or 4
            os.close(end)
        its_in, our_out, our_in, its_out = ends
        start = (
            f"import os, sys; os.dup2({its_in}, 3); os.dup2({its_out}, 4); "
            "os.execvp(sys.argv[1], sys.argv[1:])"
        )
        assert CHROMIUM is not None
        process = subprocess.Popen(
            [sys.executable, "-c", start, CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(its_in, its_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_in)
        os.close(its_out)
        try:
            yield Browser(our_out, our_in)
        finally:
            process.kill()
            process.wait()
            os.close(our_out)
            os.close(our_in)


class Visit:
    """A tab with a page from the disk, a visitor's actions, and the page's requests and errors."""

    def __init__(
        self, browser: Browser, page: Path, width: int = 1280, height: int = 800, dark: bool = False
    ):
        self.browser, self.address = browser, page.resolve().as_uri()
        self.target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=self.target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        # Only what is asked for, not what came: else the renderer keeps up to 200 MB of files for
        # whoever may ask.
        self.send("Network.enable", maxTotalBufferSize=0, maxResourceBufferSize=0)
        # In front and in focus, whichever tab the browser has there: else it refuses the clipboard
        # and draws no frames.
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.load()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **params)

    def load(self) -> None:
        """Open or reload the page."""
        self.send("Page.navigate", url=self.address)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def do(self, code: str) -> Any:
        """The value of an expression in the page, as if by a visitor's hand."""
        done = self.send(
            "Runtime.evaluate",
            expression=code,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, code: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.do(code):
            assert time.monotonic() < end, f"never: {code}"
            time.sleep(0.02)

    def key(self, name: str) -> None:
        text = {"Enter": {"text": "\r"}, " ": {"text": " "}}.get(name, {})
        code = {
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
            "Escape": 27,
            "Enter": 13,
            "Tab": 9,
        }
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code=name,
                windowsVirtualKeyCode=code.get(name, 0),
                **(text if kind == "keyDown" else {}),
            )

    def click(self, selector: str, across: float = 0.5) -> None:
        """Press and release the mouse on an element, at this share of its width."""
        # What content-visibility skips gets its height once it is in sight, and moves the element:
        # in a frame, after that frame's callbacks.
        standing = f"""(async () => {{
            const element = document.querySelector({json.dumps(selector)});
            const point = () => {{
                element.scrollIntoView({{block: "center", behavior: "instant"}});
                const box = element.getBoundingClientRect();
                return [box.left + box.width * {across}, box.top + box.height / 2];
            }};
            let before, now = point();
            do {{
                before = now;
                await new Promise(requestAnimationFrame);
                await new Promise(requestAnimationFrame);
                now = point();
            }} while (String(now) !== String(before));
            window.unpressed = true;
            const options = {{capture: true, once: true}};
            addEventListener("pointerdown", () => {{ window.unpressed = false; }}, options);
            return now;
        }})()"""
        end = time.monotonic() + PATIENCE
        pressed = False
        while not pressed:  # a browser drops what comes before it has painted the page
            assert time.monotonic() < end, f"no press arrives at {selector}"
            x, y = self.do(standing)
            for kind in ("mousePressed", "mouseReleased"):
                self.send(
                    "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
                )
            pressed = not self.do("window.unpressed")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(
            base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        )

    def complaints(self) -> list[str]:
        """What the console says, and errors that nothing caught."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        self.do("1")  # all earlier events have arrived with this answer
        return [json.dumps(event["params"]) for event in self._events() if event["method"] in kinds]

    def requests(self) -> set[str]:
        """The URL schemes of the page's requests."""
        self.do("1")
        asked = [
            event for event in self._events() if event["method"] == "Network.requestWillBeSent"
        ]
        return {event["params"]["request"]["url"].split(":")[0] for event in asked}

    def stopped_by_policy(self) -> bool:
        """Whether the page's own policy stopped something from loading."""
        self.do("1")
        failures = [
            event["params"]
            for event in self._events()
            if event["method"] == "Network.loadingFailed"
        ]
        return any(
            failure.get("blockedReason") == "csp" or "CSP" in failure["errorText"]
            for failure in failures
        )

    def _events(self) -> list[dict[str, Any]]:
        return [event for event in self.browser.events if event.get("sessionId") == self.session]

    def close(self) -> None:
        self.browser.send("Target.closeTarget", targetId=self.target)
