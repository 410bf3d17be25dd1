"""What tests that start several processes share."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

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
