"""A headless Chromium on a page of this machine, over the DevTools protocol's pipe: no driver, no port, no package.

Source: https://chromedevtools.github.io/devtools-protocol/, messages of JSON that end with a zero byte.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage",
         "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--no-first-run",
         "--hide-scrollbars", "--mute-audio")
SECONDS = 60.0  # for an answer, on a machine with other work


class Browser:
    """A connection to a browser with one page. `events` holds what the browser told unasked."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.events: list[dict[str, Any]] = []
        self._unread = b""
        self._last = 0
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the result of a command of the protocol."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self.from_browser], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self.from_browser, 2**20) if ready else b""
            assert part, "the browser ended, or does not answer"
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self.send("Browser.close")

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of some kinds so far."""
        return [event["params"] for event in self.events if event["method"] in methods]

    def open(self, page: Path) -> None:
        """Load a page and wait until its scripts have run; forget the events before."""
        self.events.clear()
        self.send("Page.navigate", url=page.absolute().as_uri())
        while not self.told("Page.loadEventFired"):
            self._read()

    def value(self, expression: str) -> Any:
        """Return the JSON value of an expression of JavaScript, or of what its promise gives."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def look(self, width: int = 1280, height: int = 900, **media: str) -> None:
        """Set the window's size and what media queries find: `prefers_color_scheme="dark"`, `type="print"`.

        Return once the page knows.
        """
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        kind = media.pop("type", "")
        self.send("Emulation.setEmulatedMedia", media=kind, features=[
            {"name": name.replace("_", "-"), "value": value} for name, value in media.items()])
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def click(self, x: float, y: float) -> None:
        """Click with the mouse at a place of the window, in CSS pixels."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="none" if kind == "mouseMoved" else "left",
                      clickCount=0 if kind == "mouseMoved" else 1)

    def picture(self) -> bytes:
        """Return the whole page as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """Return the page as it is printed."""
        return base64.b64decode(self.send("Page.printToPDF", preferCSSPageSize=True)["data"])

    def complaints(self) -> list[str]:
        """Return what the page wrote to the console, as an error or not, and what it threw."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(told) for told in self.told(*kinds)]

    def requests(self) -> list[str]:
        """Return the URLs that the page asked for, other than those that hold their content."""
        urls = [told["request"]["url"] for told in self.told("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start the browser with a profile folder of its own, and end it.

    Where there is none, the test is skipped.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    for_browser, to_browser = os.pipe()
    from_browser, of_browser = os.pipe()
    # The browser reads from file descriptor 3 and writes to 4.
    command = ["bash", "-c", f'exec "$@" 3<&{for_browser} 4>&{of_browser}', "bash", program, *FLAGS,
               f"--user-data-dir={profile}"]
    process = subprocess.Popen(command, pass_fds=(for_browser, of_browser), stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(for_browser)
    os.close(of_browser)
    try:
        browser = Browser(to_browser, from_browser)
        yield browser
        browser.close()
    finally:
        os.close(to_browser)
        os.close(from_browser)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
