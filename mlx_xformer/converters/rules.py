"""Rules: what becomes of each tensor of a checkpoint, in both directions.

A rule names tensors by templates, "layers.{i}.linear.weight": `{i}` stands for a whole number, `{side:a|b}` for one of
the words listed, which have no dots, and both sides of a rule hold the same placeholders. Every tensor must match
exactly one rule of a table. The table of the way back is derived from that of the way here.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..storage.messages import describe_misfits
from .layouts import Layout

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]*))?\}")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One source tensor becomes one target tensor.

    Attributes:
        source: The template of the source's name. Several sources are joined by rows, before the layout.
        target: The template of the target's name. With several targets the rows are split into as many equal parts,
            after the layout. None: the tensor is dropped on purpose.
        layout: The operations that lead from the one to the other.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...] | None
    layout: tuple[Layout, ...] = ()

    def __post_init__(self) -> None:
        names = {frozenset(m[1] for m in _PLACEHOLDER.finditer(t)) for t in (*self.sources, *self.targets)}
        if len(names) != 1 or (len(self.sources) != 1 and len(self.targets) != 1):
            raise ValueError(f"a rule must have one source or one target, and the same placeholders in all, got {self}")

    @property
    def sources(self) -> tuple[str, ...]:
        """The source templates."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def targets(self) -> tuple[str, ...]:
        """The target templates; none where the tensor is dropped."""
        return (self.target,) if isinstance(self.target, str) else self.target or ()

    def inverse(self) -> Rule:
        """The rule that takes the targets back to the sources."""
        words = {
            m[1]: m[0] for t in (*self.targets, *self.sources) for m in _PLACEHOLDER.finditer(t) if m[2] is not None
        }
        back = [tuple(_with_words(t, words) for t in side) for side in (self.targets, self.sources)]
        return Rule(back[0], back[1], tuple(op.inverse() for op in reversed(self.layout)))


def _with_words(template: str, words: Mapping[str, str]) -> str:
    """The template with the words of each placeholder, wherever in the rule they are listed."""
    return _PLACEHOLDER.sub(lambda m: words.get(m[1], m[0]), template)


@functools.lru_cache(maxsize=4096)
def _regex(template: str) -> re.Pattern[str]:
    """What a template matches, as a whole; a placeholder that occurs twice has the same value twice."""
    parts: list[str] = []
    seen: set[str] = set()
    end = 0
    for m in _PLACEHOLDER.finditer(template):
        parts.append(re.escape(template[end : m.start()]))
        choice = "0|[1-9][0-9]*" if m[2] is None else "|".join(re.escape(word) for word in m[2].split("|"))
        parts.append(f"(?P={m[1]})" if m[1] in seen else f"(?P<{m[1]}>{choice})")
        seen.add(m[1])
        end = m.end()
    return re.compile("".join(parts) + re.escape(template[end:]))


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda m: fields[m[1]], template)


def invert(rules: Iterable[Rule]) -> list[Rule]:
    """The table of the way back. What a rule drops has no way back."""
    return [rule.inverse() for rule in rules if rule.targets]


def inverse_shapes(rules: Iterable[Rule], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of the sources that a table turns into targets of these shapes."""
    back = invert(rules)
    blanks = {name: mx.zeros(shape) for name, shape in shapes.items()}  # lazy, never computed
    moves, problems = plan(back, blanks)
    if problems:
        raise ValueError(describe_misfits(problems))
    return {
        name: x.shape
        for move in moves
        for name, x in zip(move.targets, move([blanks[source] for source in move.sources]), strict=True)
    }


def prefixed(rules: Iterable[Rule], prefix: str) -> list[Rule]:
    """The table with `prefix` before every name on both sides."""
    return [
        Rule(tuple(prefix + t for t in r.sources), tuple(prefix + t for t in r.targets) or None, r.layout)
        for r in rules
    ]


@dataclass(frozen=True)
class Move:
    """A rule at work on tensors of these names."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    layout: tuple[Layout, ...]

    def __call__(self, tensors: Sequence[mx.array]) -> list[mx.array]:
        """The targets, given the sources. ValueError if their shapes or dtypes do not allow it."""
        if not self.targets:
            return []
        if len({(x.shape, x.dtype) for x in tensors}) != 1:
            raise ValueError(f"must have one shape and dtype, to be joined, unlike {self._odd(tensors)}")
        if len(tensors) > 1 and not tensors[0].ndim:
            raise ValueError("must have rows, to be joined")
        x = tensors[0] if len(tensors) == 1 else mx.concatenate(list(tensors), axis=0)
        for operation in self.layout:
            x = operation(x)
        if len(self.targets) == 1:
            return [x]
        if not x.ndim or x.shape[0] % len(self.targets):
            raise ValueError(f"must have rows in {len(self.targets)} equal parts")
        return list(mx.split(x, len(self.targets), axis=0))

    def describe(self, tensors: Sequence[mx.array]) -> str:
        """The sources and their shapes, for messages."""
        return _listed([f"{name} {x.shape}" for name, x in zip(self.sources, tensors, strict=True)])

    def describe_failure(self, error: ValueError, tensors: Sequence[mx.array], expected: Mapping[str, Shape]) -> str:
        """Which sources did not become which targets, and why."""
        wanted = ", ".join(f"{name} {expected.get(name, '(not expected)')}" for name in self.targets)
        return f"{self.describe(tensors)} {error} for {wanted}"

    def _odd(self, tensors: Sequence[mx.array]) -> str:
        """The sources whose shape or dtype differs from that of most."""
        kinds = [(x.shape, x.dtype) for x in tensors]
        most = Counter(kinds).most_common(1)[0][0]
        odd = [(name, *kind) for name, kind in zip(self.sources, kinds, strict=True) if kind != most]
        return _listed([f"{name} {shape}{'' if dtype == most[1] else f' {dtype}'}" for name, shape, dtype in odd])


def _listed(words: Sequence[str]) -> str:
    """The words, of many only a few."""
    return ", ".join(words if len(words) <= 4 else [*words[:2], f"... ({len(words)} in all)", words[-1]])


class _Index:
    """Finds the source templates that a name matches by the words that are no placeholders.

    A mixture of experts has thousands of names and hundreds of templates: trying each would take minutes.
    """

    def __init__(self, rules: Sequence[Rule]):
        self._tables: dict[tuple[int, tuple[int, ...]], dict[tuple[str, ...], list[tuple[int, int, str]]]] = {}
        for r, rule in enumerate(rules):
            for part, template in enumerate(rule.sources):
                words = _PLACEHOLDER.sub("{}", template).split(".")
                fixed = tuple(n for n, word in enumerate(words) if "{}" not in word)
                table = self._tables.setdefault((len(words), fixed), {})
                table.setdefault(tuple(words[n] for n in fixed), []).append((r, part, template))

    def __call__(self, name: str) -> list[tuple[int, int, tuple[tuple[str, str], ...]]]:
        """(rule, which of its sources, values of the placeholders) of each template that a name matches."""
        words = name.split(".")
        near = [
            hit
            for (count, fixed), table in self._tables.items()
            if count == len(words)
            for hit in table.get(tuple(words[n] for n in fixed), ())
        ]
        return [
            (r, part, tuple(sorted(found.groupdict().items())))
            for r, part, template in near
            if (found := _regex(template).fullmatch(name))
        ]


def plan(rules: Sequence[Rule], names: Iterable[str]) -> tuple[list[Move], list[tuple[str, str]]]:
    """Applies the rules to names alone.

    Returns:
        The moves, in the order of the names; and (kind, line) for every name that does not match exactly one rule and
        for every missing part of a join.
    """
    moves, problems, _ = _plan(rules, names)
    return moves, problems


def _plan(rules: Sequence[Rule], names: Iterable[str]) -> tuple[list[Move], list[tuple[str, str]], set[str]]:
    """As plan, and the targets of joins with missing parts."""
    problems: list[tuple[str, str]] = []
    index = _Index(rules)
    joins: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]] = {}
    for name in names:
        hits = index(name)
        if len(hits) == 1:
            r, part, fields = hits[0]
            joins.setdefault((r, fields), {})[part] = name
        elif hits:
            problems.append(("ambiguous", f"{name} meets {len(hits)} rules"))
        else:
            problems.append(("leftover", f"{name} meets no rule"))
    moves: list[Move] = []
    spoilt: set[str] = set()
    for (r, fields), parts in joins.items():
        rule = rules[r]
        wanted = [_fill(template, dict(fields)) for template in rule.sources]
        problems += [("missing", name) for part, name in enumerate(wanted) if part not in parts]
        targets = tuple(_fill(template, dict(fields)) for template in rule.targets)
        if len(parts) == len(wanted):
            moves.append(Move(tuple(wanted), targets, rule.layout))
        else:
            spoilt.update(targets)
    return moves, problems, spoilt


def apply_rules(
    rules: Sequence[Rule], tensors: Mapping[str, mx.array], expected: Mapping[str, Shape]
) -> dict[str, mx.array]:
    """Applies a table to tensors. Of lazy arrays nothing is computed.

    Args:
        rules: The table.
        tensors: The sources by name.
        expected: The shapes of exactly the targets that are to be made.

    Returns:
        The targets by name.

    Raises:
        ValueError: Something does not fit. The message lists all that is leftover, ambiguous, duplicate, unexpected,
            missing or misshapen.
    """
    moves, problems, spoilt = _plan(rules, tensors)
    result: dict[str, mx.array] = {}
    for move in moves:
        sources = [tensors[name] for name in move.sources]
        try:
            made = move(sources)
        except ValueError as error:
            problems.append(("misshapen", move.describe_failure(error, sources, expected)))
            spoilt.update(move.targets)
            continue
        given = move.describe(sources)
        for name, x in zip(move.targets, made, strict=True):
            if name in result:
                problems.append(("duplicate", f"{name}, again from {given}"))
            elif name not in expected:
                problems.append(("unexpected", f"{name} {x.shape}, from {given}"))
            elif x.shape != tuple(expected[name]):
                problems.append(("misshapen", f"{name} must be {tuple(expected[name])}, got {x.shape} from {given}"))
            result[name] = x
    problems += [("missing", f"{name} {tuple(expected[name])}") for name in expected.keys() - result.keys() - spoilt]
    if problems:
        raise ValueError(describe_misfits(problems))
    return result
