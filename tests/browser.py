"""A browser with real keys and fingers, driven by its DevTools protocol: what a page shows, and what it complains of."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tornado.websocket import websocket_connect

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = {"Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}  # their codes


class Browser:
    """One page. Use as a context; profile: an empty folder. Nothing is resolved, so that no request leaves the machine."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900):
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.loop, self.complaints, self.calls = asyncio.new_event_loop(), [], 0
        address = _address(profile / "DevToolsActivePort")
        self.socket = self._await(lambda: websocket_connect(address, max_message_size=2**28))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setTouchEmulationEnabled", enabled=width < 600)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()
        self.loop.close()

    def send(self, method: str, **parameters) -> dict:
        """Call a method of the protocol. Raises RuntimeError where the browser refuses."""
        self.calls += 1
        self.socket.write_message(json.dumps({"id": self.calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._await(self.socket.read_message))
            if message.get("id") == self.calls:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._heard(message.get("method"), message.get("params", {}))

    def _await(self, start: Callable, seconds: float = 60):
        async def done():
            return await asyncio.wait_for(start(), seconds)

        return self.loop.run_until_complete(done())

    def _heard(self, event: str | None, about: dict) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(about["exceptionDetails"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.complaints.append(about["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.complaints.append(f"console.{about['type']}: {about['args']}")
        elif event == "Network.requestWillBeSent" and about["request"]["url"].startswith(("http:", "https:")):
            self.complaints.append(about["request"]["url"])

    def open(self, page: Path) -> None:
        self.send("Page.navigate", url=page.as_uri())
        self.wait(f"location.pathname.endsWith({page.name!r}) && document.readyState === 'complete'")

    def value(self, expression: str):
        """What an expression is in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']['exception'].get('description')}")
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        """Until an expression is true in the page. Raises TimeoutError."""
        until = time.monotonic() + seconds
        while not self.value(expression):
            if time.monotonic() > until:
                raise TimeoutError(f"after {seconds} s still not: {expression}")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def touch(self, selector: str) -> None:
        """Tap the middle of an element."""
        place = f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect()))(document.querySelector({selector!r}))"
        box = self.value(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({place})")
        point = {"x": box[0], "y": box[1]}
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))


def _address(file: Path) -> str:
    """Where the browser listens for its one page, once it has written its port."""
    until = time.monotonic() + 60
    while not (file.exists() and file.read_text().count("\n")):
        if time.monotonic() > until:
            raise TimeoutError("the browser does not start")
        time.sleep(0.1)
    port = file.read_text().split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
        return next(target["webSocketDebuggerUrl"] for target in json.load(answer) if target["type"] == "page")
