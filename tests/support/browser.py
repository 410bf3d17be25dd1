"""Headless Chromium, driven over WebDriver by urllib: enough to open a page without network, use it and look at it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
]


class Browser:
    """One session. Errors of the browser or the page are RuntimeErrors."""

    def __init__(self, driver: str):
        self.driver, self.session = driver, ""

    def send(self, method: str, path: str, **body: object) -> object:
        """One WebDriver command."""
        data = None if method == "GET" else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.driver}{self.session}{path}", data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(json.load(error)["value"]["message"]) from None

    def run(self, script: str, *arguments: object) -> object:
        """The value of a function body in the page; a promise is awaited."""
        return self.send("POST", "/execute/sync", script=script, args=arguments)

    def devtools(self, command: str, **parameters: object) -> object:
        """A command of the DevTools protocol."""
        return self.send("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def wait(self, script: str, seconds: float = 20) -> object:
        """The first true value of a function body."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise RuntimeError(f"still not true after {seconds} s: {script}")
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """As a mouse does: in the middle, and only where nothing covers it."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({ block: 'center' })", selector)
        found = self.send("POST", "/element", using="css selector", value=selector)
        self.send("POST", f"/element/{next(iter(found.values()))}/click")

    def press(self, key: str) -> None:
        """A key, to whatever has the focus."""
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.send("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": keys}])

    def look(self, width: int, height: int, *, dark: bool, path: Path | None = None) -> bytes:
        """A PNG of the window at a size and in a colour scheme."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 600
        )
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])
        time.sleep(0.4)
        picture = base64.b64decode(self.send("GET", "/screenshot"))
        if path is not None:
            path.write_bytes(picture)
        return picture


def _program(*names: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    raise RuntimeError(f"the browser tests need {' or '.join(names)} (Debian: chromium and chromium-driver)")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A session that is offline, in a profile of its own. RuntimeError where Chromium is missing."""
    driver = _program("chromedriver")
    binary = _program("chromium", "chromium-browser", "google-chrome")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        browser = None
        try:
            line = next(line for line in process.stdout if "started successfully on port" in line)
            browser = Browser(f"http://127.0.0.1:{line.rstrip().rstrip('.').split()[-1]}")
            options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = browser.send("POST", "/session", capabilities={"alwaysMatch": wanted})
            browser.session = f"/session/{made['sessionId']}"
            browser.devtools("Network.enable")
            browser.devtools(
                "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
            )
            yield browser
        finally:
            if browser is not None and browser.session:
                browser.send("DELETE", "")
            process.terminate()
            process.communicate(timeout=20)
