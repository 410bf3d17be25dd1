"""Programs that tests start: Pythons of their own, command lines, several processes side by side, and a browser."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_xformer import cli

BIN = Path(sys.executable).parent
LIMIT = 120  # seconds


def free_ports():
    """Two neighbouring ports that nobody listens at."""
    for port in random.SystemRandom().sample(range(20011, 60013, 2), 100):
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 1))
            return port, port + 1
    raise OSError("no two free ports")


def run(*commands, meanwhile=lambda children: None):
    """(exit code, stdout, stderr) of each (command, environment), side by side; none outlives it."""
    pipe, answers, children = subprocess.PIPE, [], []
    limit = time.monotonic() + LIMIT
    try:
        for command, environment in commands:
            given = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, "text": True}
            command = list(map(str, command))
            children.append(subprocess.Popen(command, **given, env=os.environ | environment, start_new_session=True))
        meanwhile(children)
        for child in children:
            out, err = child.communicate(timeout=limit - time.monotonic())
            answers.append((child.returncode, out, err))
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # the session that started above
                child.communicate()
    return answers


def side_by_side(folder, *command, **given):
    """The answers of two processes of a command, started as mlx.launch starts them."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports()]))
    return run(*((command, {"MLX_HOSTFILE": str(hosts), "MLX_RANK": rank}) for rank in "01"), **given)


def run_script(script, *arguments):
    """(exit code, stdout, stderr) of a script that runs in this process, as if Python had been started with it."""
    before = sys.argv, sys.path
    sys.argv, sys.path = [str(script), *map(str, arguments)], [str(Path(script).parent), *sys.path]
    try:
        return _answer(lambda: runpy.run_path(str(script), run_name="__main__") and 0)
    finally:
        sys.argv, sys.path = before


def run_command(*arguments):
    """(exit code, stdout, stderr) of mlx-xformer with these arguments, in this process."""
    return _answer(lambda: cli.main(list(map(str, arguments))))


def _answer(call):
    """(exit code, stdout, stderr) of call(), which returns its exit code or exits."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = call()
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
    return code or 0, out.getvalue(), err.getvalue()


def start(code, *arguments, **given):
    """A Python of its own, with errors as text."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **given)


def end(process, limit=120):
    """(exit code, stdout, stderr) of a process that may take `limit` seconds."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


# Runs command lines as told on standard input, each with room for `file` bytes in a file or `disk` bytes on the disk;
# answers what came of each, and what lies below the output folder, which then goes. Descriptors are caught, so that
# what C libraries print is seen as well.
SHELL = """
import faulthandler, json, os, pathlib, resource, shutil, sys, tempfile
from hashlib import sha256
from mlx_xformer import cli

def run(arguments, out, file, disk):
    ballast = out.parent / "ballast"
    if disk is not None:
        room = os.statvfs(out.parent)
        with ballast.open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, room.f_bavail * room.f_frsize - disk)
    if file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file, resource.RLIM_INFINITY))
    try:
        return cli.main(arguments), None
    except BaseException as failure:
        return None, repr(failure)
    finally:
        sys.stdout.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        ballast.unlink(missing_ok=True)

answers = os.fdopen(os.dup(1), "w")
faulthandler.enable(os.dup(2))
for line in sys.stdin:
    print("begin", file=answers, flush=True)
    arguments, out, *room = json.loads(line)
    out, streams = pathlib.Path(out), [tempfile.TemporaryFile() for _ in "oe"]
    for stream, fd in zip(streams, (1, 2)):
        os.dup2(stream.fileno(), fd)
    code, error = run([*arguments, "-o", str(out)], out, *room)
    texts = [os.pread(stream.fileno(), 10**6, 0).decode(errors="replace") for stream in streams]
    files = [path for path in out.rglob("*") if path.is_file()]
    found = {str(path.relative_to(out)): [path.stat().st_size, sha256(path.read_bytes()).hexdigest()] for path in files}
    print(json.dumps([code, *texts, error, found, out.exists()]), file=answers, flush=True)
    shutil.rmtree(out, ignore_errors=True)
"""


@dataclass
class Result:
    """What came of a command line; files: sizes and SHA-256 of all below the output folder."""

    code: int | None
    out: str
    err: str
    error: str | None
    files: dict[str, list]
    folder_exists: bool


def run_all(tasks, prefix=(), limit=240):
    """The Result of each (arguments, out, room in a file or None, room on the disk or None), in one process."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([*prefix, sys.executable, "-c", SHELL], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    given = "".join(json.dumps([list(map(str, arguments)), str(out), *room]) + "\n" for arguments, out, *room in tasks)
    try:
        out, err = process.communicate(given, timeout=limit)
    except subprocess.TimeoutExpired as late:
        process.kill()
        done = (late.stdout or b"").decode().count("begin")
        raise AssertionError(f"hangs in {tasks[done - 1]}") from None
    lines = [line for line in out.splitlines() if line != "begin"]
    last = tasks[min(out.count("begin\n"), len(tasks)) - 1]
    assert process.returncode == 0, f"exit code {process.returncode} in {last}: {err}"
    return [Result(*json.loads(line)) for line in lines]


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
        return self.wait_for(lambda: self.run(script), seconds, script)

    def wait_for(self, ask: Callable[[], object], seconds: float = 20, about: str = "") -> object:
        """The first true value of a function."""
        end = time.monotonic() + seconds
        while not (value := ask()):
            if time.monotonic() > end:
                raise RuntimeError(f"still not true after {seconds} s: {about}")
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """As a mouse does: in the middle, and only where nothing covers it."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({ block: 'center' })", selector)
        found = self.send("POST", "/element", using="css selector", value=selector)
        self.send("POST", f"/element/{next(iter(found.values()))}/click")

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, to whatever has the focus."""
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        if shift:
            keys = [{"type": "keyDown", "value": "\ue008"}, *keys, {"type": "keyUp", "value": "\ue008"}]
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
