"""The workflows of GitHub, as far as they can be checked here: `make check` holds them to GitHub's schema."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from mlx_xformer.cli import _parser

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands(path):
    """The shell lines of all steps of a workflow."""
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [line for job in jobs for step in job.get("steps", []) for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_are_understood(path):
    """Every make target of a workflow exists, and every mlx-xformer command parses."""
    words = [shlex.split(line) for line in commands(path)]
    makes = [line[1:] for line in words if line[0] == "make"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert makes and {target for line in makes for target in line} <= targets
    ours = [line[1:] for line in words if Path(line[0]).name == "mlx-xformer"]
    assert ours
    for arguments in ours:
        _parser().parse_args(arguments)


def test_python_versions_are_those_of_the_package():
    """CI runs every version of Python that the package claims."""
    matrix = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["linux"]["strategy"]["matrix"]
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert matrix["python"] == claimed
