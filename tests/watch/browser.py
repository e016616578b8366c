"""A headless Chromium, spoken to through its own protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SECONDS = 60


class Browser:
    """One page in a browser; an async context manager.

    Args:
        profile: a folder for the browser's own files.
    """

    def __init__(self, profile: Path) -> None:
        self._profile, self._numbers = profile, itertools.count(1)
        self.requests: list[str] = []
        self.problems: list[str] = []

    async def __aenter__(self) -> Browser:
        assert PROGRAM is not None
        self._process = subprocess.Popen(
            [
                *(PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--remote-debugging-port=0", f"--user-data-dir={self._profile}", "--disable-background-networking"),
                *("--disable-component-update", "--disable-sync", "--no-first-run", "about:blank"),
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if match := re.search(r"DevTools listening on (ws://\S+)", line):
                break
        else:
            raise RuntimeError("the browser did not start")
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(match[1], max_msg_size=0)
        target = (await self._call("Target.createTarget", url="about:blank"))["targetId"]
        found = await self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._attached = found["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self._call(f"{domain}.enable")
        return self

    async def __aexit__(self, *details: object) -> None:
        await self._session.close()
        self._process.kill()
        self._process.communicate()

    async def open(self, url: str, width: int, height: int) -> None:
        """Go to a page as a screen of that size shows it."""
        await self.resize(width, height)
        await self._call("Page.navigate", url=url)

    async def resize(self, width: int, height: int) -> None:
        """Change the size of the screen."""
        mobile = width < 600
        await self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )

    async def evaluate(self, code: str) -> Any:
        """The value of an expression in the page."""
        found = await self._call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    async def until(self, code: str) -> None:
        """Wait until an expression is true."""
        for _ in range(_SECONDS * 10):
            if await self.evaluate(code):
                return
            await asyncio.sleep(0.1)
        raise TimeoutError(f"{code}\n{await self.evaluate('document.body.innerText')}")

    async def screenshot(self, path: Path) -> None:
        """Write what the whole page looks like."""
        found = await self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    async def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if hasattr(self, "_attached"):
            message["sessionId"] = self._attached
        await self._socket.send_json(message)
        while True:
            answer = await self._socket.receive_json(timeout=_SECONDS)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        details = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.problems.append(str(details["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded" and details["entry"]["level"] == "error":
            self.problems.append(details["entry"]["text"])
