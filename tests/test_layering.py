"""Who may import whom: the layers of the package, read with ast."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    ["_version", "fields"],
    ["openblas"],
    ["runtime"],
    ["cpu"],
    ["kernels"],
    ["linear"],
    ["masks", "positions", "layers", "spectral", "inputs"],
    ["mel"],
    ["cache"],
    ["scores", "attention_config"],
    ["sdpa"],
    ["attention"],
    ["moe_config"],
    ["routing"],
    ["experts", "grouping"],
    ["moe", "torch_layout"],
    ["expert_parallel"],
    ["blocks"],
    ["conditioning"],
    ["models"],
    ["checkpoint"],
    ["converters.torch_pickle", "converters.layouts"],
    ["converters.torch_file"],
    ["converters.ctranslate2"],
    ["converters.source", "converters.rules", "converters.rope"],
    ["converters.folder", "converters.mixture", "converters.keys", "converters.scratch"],
    ["converters.FAMILY"],
    ["converters.gguf"],
    ["converters.language", "converters.networks"],
    ["converters.convert"],
    ["pretrained", "stems", "segments", "samplers", "tokenizer", "prompt_cache"],
    ["decoding"],
    ["generate", "separate", "measure", "sentences"],
    ["report"],
    ["parity"],
    ["cli"],
]
FREE = ["reference", "audio"]  # import nothing of ours, and anything may import them
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names} | dict.fromkeys(FREE, -1)


def sources() -> dict[str, Path]:
    """Dotted module name below mlx_xformer -> file."""
    files = {}
    for folder, prefix in ((ROOT / "mlx_xformer", ()), (ROOT / "converters", ("converters",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            files[".".join(parts)] = path
    return files


def layer(module: str) -> str:
    """The name under which a module stands in LAYERS."""
    parts = module.split(".")
    if parts[0] != "converters" or len(parts) == 1:
        return parts[0]
    name = ".".join(parts[:2])
    return "__init__" if parts[1] == "__init__" else name if name in RANK else "converters.FAMILY"


def imports(module: str, path: Path) -> set[str]:
    """What a file imports: our modules as dotted names, others with a leading '!'."""
    package = ["mlx_xformer", *module.split(".")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" if origin == "mlx_xformer" else origin for alias in node.names]
            if origin == "mlx_xformer.converters":
                names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {n.removeprefix("mlx_xformer.") if n.startswith("mlx_xformer.") else f"!{n}" for n in names}
    return found


FILES = sources()


def broken(module: str, path: Path) -> list[str]:
    """The imports of a file that the layers forbid."""
    own = layer(module)
    if own == "__init__":
        return []
    wrong = []
    for name in imports(module, path):
        if name.startswith("!"):
            if name[1:].split(".")[0] in ("torch", "demucs") or (own == "reference" and name.startswith("!mlx")):
                wrong.append(name)
            continue
        other = layer(name)
        inside = other == own and own in ("cache", "models", "reference", "parity", "cli")
        if not inside and (own in FREE or RANK[other] >= RANK[own]):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_only_lower_layers(module):
    assert layer(module) in RANK or layer(module) in ("__init__", "converters"), f"{module} has no place in LAYERS"
    assert broken(module, FILES[module]) == []


def test_models_do_not_import_one_another():
    for module, path in FILES.items():
        if not module.startswith("models."):
            continue
        family = module.split(".")[1].removesuffix("_config")  # which a file beside a model's may hold
        for name in imports(module, path):
            assert not name.startswith("models.") or name.split(".")[1].removesuffix("_config") == family, module


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("attention", "from .models.htdemucs import HTDemucs"),
        ("kernels", "import torch"),
        ("reference.layers", "from ..kernels import gelu"),
        ("reference.layers", "import mlx.core as mx"),
        ("separate", "from .cli import main"),
        ("converters.rules", "from .convert import convert"),
        ("audio", "from . import runtime"),
        ("masks", "from .positions import sinusoidal_1d"),
    ],
)
def test_the_check_sees_a_forbidden_import(tmp_path, module, code):
    path = tmp_path / "module.py"
    path.write_text(code + "\n")
    assert broken(module, path), code
