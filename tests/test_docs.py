"""What docs/ and CONTRIBUTING.md say of the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlx_xformer"
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLANNED = {"training", "speech", "codec"}  # rooms to come, see docs/architecture.md


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    """Paths in backticks exist at the top, below mlx_xformer/ or beside the page; NAME stands for any name."""
    text = re.sub(r"\[.*?\]\(https://.*?\|", "", page.read_text())  # paths of other repositories
    names = re.findall(r"`([\w.-]+(?:/[\w.-]*)+|[\w-]+\.(?:py|md|toml))`", text)
    places = [ROOT, PACKAGE, page.parent, PACKAGE / "nn", ROOT / "examples"]
    missing = [n for n in names if not any([*place.glob(n.rstrip("/").replace("NAME", "*"))] for place in places)]
    assert names and not missing


def test_long_files_are_few_and_named():
    """docs/architecture.md says which files of the package have more than 300 lines, and why."""
    section = (ROOT / "docs" / "architecture.md").read_text().partition("## Files over 300 lines")[2]
    named = set(re.findall(r"`([\w/]+\.py)`", section))
    found = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if p.read_text().count("\n") > 300}
    assert found == named and len(named) <= 3


def test_every_room_is_in_the_tree():
    tree = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    block, layers = re.findall(r"```\n(.*?)```", tree, re.S)[:2]
    assert rooms <= set(re.findall(r"^  (\w+)/", block, re.M))
    assert set(layers.split()) == rooms | PLANNED
