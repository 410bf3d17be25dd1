"""Who may import whom: each contract of pyproject.toml is kept, and sees an import that breaks it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx_xformer

PACKAGE = Path(mlx_xformer.__file__).parent
CONTRACTS = Path(__file__).parent.parent / "pyproject.toml"
BREACHES = {  # contract -> (module, an import that breaks the contract there)
    "Rooms import lower rooms only": ("nn.masks", "from ..models.htdemucs import HTDemucs"),
    "Layers of nn import lower layers only": ("nn.positions", "from .attention.core import attention"),
    "attention() stands below the Attention module": ("nn.attention.core", "from .layer import Attention"),
    "Conversions stand above families, families above formats, formats above rules": (
        "converters.rules",
        "from .conversion import convert",
    ),
    "Models do not import one another": ("models.bert", "from .t5 import T5"),
    "Families of converters do not import one another": ("converters.families.bert", "from .t5 import rules as other"),
    "The NumPy twin imports nothing of MLX": ("reference.nn.layers", "import mlx.core as mx"),
    "Neither PyTorch nor demucs is imported": ("text.tokenizer", "import torch"),
    "Only backend imports backend.linux": ("nn.mel", "from ..backend.linux import chains"),
    "No package has a circle of imports": ("text.samplers", "from .generation import generate"),
}


def check(folder):
    """What import-linter says of the copy of the package in a folder: {broken contract: its report}, and all of it."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo", CONTRACTS]
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "300"}
    printed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout
    reports = re.split(r"^(.+)\n-+\n", printed.partition("Broken contracts\n---")[2], flags=re.M)[1:]
    return dict(zip(reports[::2], reports[1::2], strict=True)), printed


def test_each_contract_sees_what_breaks_it(tmp_path):
    copy = tmp_path / "mlx_xformer"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "data"))
    broken, printed = check(tmp_path)
    assert broken == {} and f"{len(BREACHES)} kept, 0 broken" in printed, printed
    for module, line in BREACHES.values():
        with (copy / module.replace(".", "/")).with_suffix(".py").open("a") as file:
            file.write(f"\n{line}\n")
    broken, printed = check(tmp_path)
    assert broken.keys() == BREACHES.keys(), printed
    for contract, (module, _) in BREACHES.items():
        assert re.search(rf"\b{module}\b|\.{module.rpartition('.')[2]} ", broken[contract]), broken[contract]
