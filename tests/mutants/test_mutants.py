"""Bugs planted into every room of the package (make check): each must be noticed by the check that its table names."""

from __future__ import annotations

import pytest
from mutants import (
    audio_files,
    audio_reading,
    backend,
    cli,
    converters,
    models,
    models_causal_lm,
    models_guides,
    models_htdemucs,
    nn_attention,
    nn_cache,
    nn_layers,
    nn_moe,
    parity_samples,
    separation,
    text,
)
from mutants.runner import Bug, Outcomes

TABLES = [
    audio_files,
    audio_reading,
    backend,
    cli,
    converters,
    models,
    models_causal_lm,
    models_guides,
    models_htdemucs,
    nn_attention,
    nn_cache,
    nn_layers,
    nn_moe,
    parity_samples,
    separation,
    text,
]
BUGS = [bug for table in TABLES for bug in table.BUGS]
UNCHANGED = [Bug("", None, "", "", check) for check in dict.fromkeys(bug.check for bug in BUGS)]


@pytest.fixture(scope="session")
def outcomes(request):
    """What the checks of all bugs that this session runs said."""
    items = [item for item in request.session.items if "outcomes" in getattr(item, "fixturenames", ())]
    found = Outcomes([item.callspec.params["bug"] for item in items])
    yield found
    found.close()


def test_the_source_of_every_bug_occurs_once():
    """Whoever changes the source of the package mends what is named here in the tables."""
    wrong = [f"{bug} ({bug.places()} times): {bug.source}" for bug in BUGS if bug.places() != 1]
    assert not wrong, "\n".join(wrong)
    assert all(bug.source != bug.planted for bug in BUGS) and len(set(map(str, BUGS))) == len(BUGS)


@pytest.mark.mutants
@pytest.mark.parametrize("bug", UNCHANGED, ids=str)
def test_the_unchanged_source_passes(outcomes, bug):
    assert outcomes[bug] is None


@pytest.mark.mutants
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_caught(outcomes, bug):
    assert outcomes[bug], f"{' '.join(bug.check)} passes with {bug}"
