"""The child of tests/torch_oracle.py: one JSON request a line on standard input, one JSON answer a line back.

Arrays travel as .npz files in the client's temporary folder. Run by the Python of the oracle's environment.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO

import numpy as np


def answer(line: str) -> dict:
    """Serves one request: {op, params, arrays: path or null, answer: path}."""
    from operations import OPS

    request = json.loads(line)
    operation = OPS.get(request["op"])
    if operation is None:  # transformers takes seconds to import
        from language import OPS as LANGUAGE

        operation = LANGUAGE[request["op"]]
    arrays: dict[str, np.ndarray] = {}
    if request["arrays"]:
        with np.load(request["arrays"]) as stored:
            arrays = {name: stored[name] for name in stored.files}
    values, results = operation(arrays=arrays, **request["params"])
    np.savez(request["answer"], **results)
    return {"ok": True, "values": values}


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answers requests until the input ends."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for line in requests:
        try:
            reply = answer(line)
        except Exception:
            reply = {"ok": False, "error": traceback.format_exc()}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints to standard error
    serve(sys.stdin, channel)
