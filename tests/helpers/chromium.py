"""Headless Chromium by its own protocol over two pipes: no driver, no port, no package."""

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
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
INSTALL = "apt-get update && apt-get install --yes --no-install-recommends chromium"


def find_chromium() -> str | None:
    """The browser on this machine."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Chromium:
    """One browser with one page.

    Args:
        folder: for its profile.
        timeout_s: of every wait.
    """

    def __init__(self, binary: str, folder: Path, *, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        self._next_id = 0
        self._buffer = b""
        self.messages: list[dict[str, Any]] = []
        """Events so far: console, exceptions, network."""
        commands, self._to_browser = os.pipe()
        self._from_browser, replies = os.pipe()
        arguments = [
            binary,
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            "--no-sandbox",  # root in a container
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--hide-scrollbars",
            "--force-device-scale-factor=1",
            "about:blank",
        ]

        # The browser reads commands at 3 and writes at 4; the shell puts the pipes there.
        line = f'exec "$0" "$@" 3<&{commands} 4>&{replies}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", line, *arguments], pass_fds=(commands, replies), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(replies)
        target = self._call("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError, RuntimeError):
            self._call("Browser.close", {}, session=None)
        os.close(self._to_browser)
        os.close(self._from_browser)
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """One command of the protocol, to the page."""
        return self._call(method, arguments, session=self._session)

    def open(self, url: str) -> None:
        """Go there, until the document is complete."""
        self.messages.clear()
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, promises awaited.

        Raises:
            AssertionError: it threw.
        """
        reply = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + self._timeout_s
        # The page itself looks again and again; between two documents there is nobody who could.
        look = f"new Promise((done) => {{ const look = () => ({condition}) ? done(true) : setTimeout(look, 20); look(); }})"
        timer = "new Promise((done) => setTimeout(() => done(false), 2000))"
        while not self._true(f"Promise.race([{look}, {timer}])"):
            assert time.monotonic() < deadline, f"never true: {condition}\n{self.problems()}"

    def _true(self, expression: str) -> bool:
        try:
            return self.evaluate(expression) is True
        except AssertionError as exc:
            if "context" in str(exc) or "navigated" in str(exc):
                return False
            raise

    def press(self, key: str, *, ctrl: bool = False) -> None:
        """One key, as a person presses it."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37}
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        common = {
            "key": key,
            "modifiers": 2 if ctrl else 0,
            "windowsVirtualKeyCode": codes.get(key, ord(key.upper()) if len(key) == 1 else 0),
        }
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({} if ctrl or not text else {"text": text}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def size(self, width: int, height: int) -> None:
        """Of the window."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """`dark` or `light`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page, or of the window."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def problems(self) -> list[str]:
        """Exceptions, errors of the console and broken rules of the content policy so far."""
        return [problem for message in self.messages if (problem := _problem(message))]

    def _call(self, method: str, arguments: dict[str, Any], *, session: str | None) -> dict[str, Any]:
        self._next_id += 1
        command = {"id": self._next_id, "method": method, "params": arguments, **({"sessionId": session} if session else {})}
        os.write(self._to_browser, json.dumps(command).encode() + b"\0")
        for message in self._replies():
            if message.get("id") == self._next_id:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self.messages.append(message)
        raise RuntimeError(f"the browser ended at {method}")

    def _replies(self) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + self._timeout_s
        while True:
            while b"\0" in self._buffer:
                whole, _, self._buffer = self._buffer.partition(b"\0")
                yield json.loads(whole)
            readable, _, _ = select.select([self._from_browser], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, "the browser does not answer"
            part = os.read(self._from_browser, 1 << 20)
            if not part:
                return
            self._buffer += part


def _problem(message: dict[str, Any]) -> str | None:
    given = message.get("params", {})
    match message.get("method"):
        case "Runtime.exceptionThrown":
            return str(given["exceptionDetails"].get("exception", {}).get("description", given["exceptionDetails"]["text"]))
        case "Runtime.consoleAPICalled" if given["type"] in ("error", "warning"):
            return str([argument.get("value") for argument in given["args"]])
        case "Log.entryAdded" if given["entry"]["level"] == "error":
            return str(given["entry"]["text"])
        case _:
            return None
