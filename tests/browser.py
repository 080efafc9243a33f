"""Chromium without a window, driven over its debugging pipe: what a reader of a page sees and does."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
TROUBLE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


class Browser:
    """One page at a time. `with Browser(folder) as browser`; `folder` holds the profile."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        self.events: list[dict[str, Any]] = []
        self._last = 0
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Chromium listens on descriptor 3 and answers on 4.
        line = f'exec "$@" 3</dev/fd/{theirs_in} 4>/dev/fd/{theirs_out}'
        command = ["sh", "-c", line, "sh", CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        with open(folder / "stderr", "wb") as stderr:
            self._process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stderr=stderr)
        os.close(theirs_in)
        os.close(theirs_out)
        self._received = b""
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the DevTools protocol."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._read(lambda message: message.get("id") == self._last)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def open(self, path: Path, *, width: int = 1100, dark: bool = False, script: bool = True) -> None:
        """Load the page in a window of `width` pixels and wait until it is there."""
        self.events.clear()
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._wait_for(lambda event: event["method"] == "Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str, *kinds: str) -> None:
        """Press a key that has no character, such as `ArrowRight`, with whatever has the focus.

        `kinds` are of the events, by default those of pressing it and letting it go.
        """
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Escape": 27, "Enter": 13}[key]
        for kind in kinds or ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def mouse(self, selector: str, *kinds: str) -> None:
        """Events of the mouse, such as `mouseMoved`, in the middle of the first element that a selector finds."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{place}.scrollIntoView({{block: 'center'}})")
        x, y = self.value(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({place}.getBoundingClientRect())"
        )
        for kind in kinds:
            pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def click(self, selector: str) -> None:
        """Press and let go the mouse over the first element that a selector finds."""
        self.mouse(selector, "mouseMoved", "mousePressed", "mouseReleased")

    def downloaded(self, selector: str, name: str, folder: Path) -> bytes:
        """The file called `name` that a click saves, in `folder`."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True)
        self.events.clear()
        self.click(selector)
        self._wait_for(
            lambda event: event["method"] == "Browser.downloadProgress" and event["params"]["state"] == "completed"
        )
        return (folder / name).read_bytes()

    def trouble(self) -> list[dict[str, Any]]:
        """Everything that the page wrote to the console, errors and refused requests among it."""
        return [event for event in self.events if event["method"] in TROUBLE]

    def requests(self) -> list[str]:
        """The addresses that the page asked for, pictures inside the file left out."""
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [url for event in sent if not (url := event["params"]["request"]["url"]).startswith("data:")]

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Until such an event has come, perhaps before."""
        if not any(map(wanted, self.events)):
            self._read(lambda message: "method" in message and wanted(message))

    def _read(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next message that is wanted; events on the way are kept."""
        while True:
            while b"\0" not in self._received:
                read = os.read(self._in, 1 << 16)
                assert read, f"the browser ended: {self._process.poll()}"
                self._received += read
            line, self._received = self._received.split(b"\0", 1)
            message: dict[str, Any] = json.loads(line)
            if "method" in message:
                self.events.append(message)
            if wanted(message):
                return message
