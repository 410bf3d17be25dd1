"""Golden outputs of real checkpoints."""

from __future__ import annotations

import numpy as np
from support.harness import data_folder

from mlx_xformer import parity


def golden(name):
    with np.load(data_folder() / "golden" / f"{name}.npz") as stored:
        return {key: stored[key] for key in stored.files}


def proven(folder):
    report = parity.run(folder=folder, seeds=1)
    assert not report.failed, report.table()
