"""Names: what the package exports, no export that hides a module, and one name for a family everywhere."""

import ast
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

import mlx_xformer
from mlx_xformer.models.families import MODULES

PACKAGE = Path(mlx_xformer.__file__).parent
ROOT = Path(__file__).parent.parent


def run(code, cwd=None, **environment):
    """Runs Python code in a process of its own that imports mlx_xformer from cwd."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd or PACKAGE.parent,
        env=os.environ | environment | {"PYTHONPATH": str(cwd or PACKAGE.parent)},
    )


# Public names


def test_importing_the_package_imports_only_the_backend():
    answer = run("import mlx_xformer, sys; print(*(name for name in sys.modules if name.startswith('mlx_xformer.')))")
    assert answer.returncode == 0, answer.stderr
    rooms = {name.split(".")[1] for name in answer.stdout.split()}
    assert rooms == {"_version", "backend"}


def test_every_public_name_can_be_imported_and_listed():
    assert len(mlx_xformer.__all__) <= 45
    code = "import mlx_xformer; print(set(mlx_xformer.__all__) - set(dir(mlx_xformer)))\nfrom mlx_xformer import "
    answer = run(code + ", ".join(mlx_xformer.__all__))
    assert answer.returncode == 0 and answer.stdout == "set()\n", answer.stderr
    with pytest.raises(AttributeError, match="'mlx_xformer' has no attribute 'nothing'"):
        _ = mlx_xformer.nothing


def test_editors_are_told_the_same_names():
    """What type checkers read, what is imported on first use, and __all__ are the same names from the same modules."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert told == mlx_xformer._MODULE_OF
    assert sorted([*told, "__version__", "backend"]) == mlx_xformer.__all__


# Modules


def hidden_modules():
    """The modules that are not what their dotted name gives, because something else has that name."""
    names = (info.name for info in pkgutil.walk_packages(mlx_xformer.__path__, "mlx_xformer."))
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    return [m.__name__ for m in modules if reduce(getattr, m.__name__.split(".")[1:], mlx_xformer) is not m]


def test_no_name_hides_a_module():
    assert hidden_modules() == []


def test_a_name_that_hides_a_module_is_seen(tmp_path):
    """An export of nn.attention named as its module core, planted into a copy of the package."""
    shutil.copytree(PACKAGE, tmp_path / "mlx_xformer", ignore=shutil.ignore_patterns("__pycache__", "data"))
    with (tmp_path / "mlx_xformer" / "nn" / "attention" / "__init__.py").open("a") as file:
        file.write("\nfrom .core import attention as core\n")
    answer = run(
        f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import test_names; print(test_names.hidden_modules())",
        tmp_path,
    )
    assert answer.stdout == "['mlx_xformer.nn.attention.core']\n", answer.stderr


# Families

FLOORS = {  # floor -> its modules that are not of one family
    "mlx_xformer/models": {"bound", "families"},
    "mlx_xformer/converters/families": {
        *("causal_lm_gguf", "causal_lm_keys", "causal_lm_moe"),
        *("htdemucs_options", "htdemucs_source"),
    },
    "mlx_xformer/reference/models": set(),
    "mlx_xformer/parity/families": {"common"},
    "tests/models": set(),
}
ABSENT = {  # a family has none on this floor
    ("guides/ferrotorch", "tests/models"): "tests/converters/guides has what is its own",
}


def members(floor):
    """The families that a floor has a module or a package for, and those of guides/ as guides/NAME."""
    folder = ROOT / floor
    found = {path for place in (folder, folder / "guides") for path in place.iterdir() if path.suffix in ("", ".py")}
    names = {path.relative_to(folder).with_suffix("").as_posix() for path in found if not path.name.startswith("__")}
    return {name.replace("test_", "") for name in names} - FLOORS[floor] - {"guides"}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_family_has_one_name_on_every_floor(floor):
    families = members("mlx_xformer/models")
    found = members(floor)
    assert families - found == {family for family, place in ABSENT if place == floor}
    if floor == "tests/models":  # a family may have several files of tests
        found = {name for name in found if not any(name.startswith(f"{family}_") for family in families)}
    assert found <= families


def test_the_table_of_families_names_their_modules():
    """Those of models.families are those on every floor; metalaudio has no checkpoints of its own."""
    assert {module.replace(".", "/") for module in MODULES} == members("mlx_xformer/models") - {"guides/metalaudio"}
