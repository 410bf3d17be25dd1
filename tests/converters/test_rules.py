"""Rules: every tensor meets exactly one, and the table leads back."""

import itertools
import time

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_xformer.converters.layouts import Expand, Halves, Permute, Squeeze, Stack
from mlx_xformer.converters.rules import Rule, apply_rules, inverse_shapes, invert, plan, prefixed


def draw(*shape, dtype=np.float32):
    return mx.array(np.random.default_rng(len(shape)).normal(size=shape).astype(dtype))


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert mx.array_equal(a[name], b[name]), name


TABLE = [
    Rule("conv.{i}.weight", "layers.{i}.conv.weight", (Squeeze(3), Permute((0, 2, 1)))),
    Rule("{side:left|right}.{i}.packed", tuple(f"{x}.{{side}}.{{i}}" for x in "qkv")),
    Rule("junk.{i}", None),
    Rule(tuple(f"expert.{e}.{{i}}.{{leaf:a|b}}" for e in range(3)), "experts.{i}.{leaf:a|b}", (Stack(3),)),
    Rule("fused.{i}", ("gate.{i}", "up.{i}"), (Halves(),)),
]
TENSORS = {
    "conv.0.weight": draw(5, 3, 7, 1),
    "conv.11.weight": draw(2, 3, 7, 1),
    "left.0.packed": draw(6, 5),
    "right.4.packed": draw(9, 2),
    **{f"expert.{e}.7.a": draw(5, 2) + e for e in range(3)},
    "fused.2": draw(3, 10, 7),
}
EXPECTED = {
    "layers.0.conv.weight": (5, 7, 3),
    "layers.11.conv.weight": (2, 7, 3),
    **{f"{x}.left.0": (2, 5) for x in "qkv"},
    **{f"{x}.right.4": (3, 2) for x in "qkv"},
    "experts.7.a": (3, 5, 2),
    "gate.2": (3, 5, 7),
    "up.2": (3, 5, 7),
}


def test_there_and_back():
    out = apply_rules(TABLE, TENSORS | {"junk.3": draw(2)}, EXPECTED)
    assert mx.array_equal(out["k.right.4"], TENSORS["right.4.packed"][3:6])
    assert mx.array_equal(out["layers.0.conv.weight"], TENSORS["conv.0.weight"][..., 0].swapaxes(1, 2))
    assert all(mx.array_equal(out["experts.7.a"][e], TENSORS[f"expert.{e}.7.a"]) for e in range(3))
    assert mx.array_equal(out["gate.2"], TENSORS["fused.2"][:, :5])
    assert mx.array_equal(out["up.2"], TENSORS["fused.2"][:, 5:])
    shapes = inverse_shapes(TABLE, EXPECTED)
    assert shapes == {name: x.shape for name, x in TENSORS.items()}
    same(apply_rules(invert(TABLE), out, shapes), TENSORS)
    same(apply_rules(invert(invert(TABLE)), TENSORS, EXPECTED), out)


def test_prefix_on_both_sides():
    tensors = {f"models.1.{name}": x for name, x in TENSORS.items()}
    expected = {f"models.1.{name}": shape for name, shape in EXPECTED.items()}
    out = apply_rules(prefixed(TABLE, "models.1."), tensors, expected)
    same(apply_rules(invert(prefixed(TABLE, "models.1.")), out, {n: x.shape for n, x in tensors.items()}), tensors)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"conv.0.bias": draw(3)}, "leftover: conv.0.bias meets no rule"),
        ({"conv.01.weight": draw(5, 3, 7, 1)}, "leftover: conv.01.weight meets no rule"),
        ({"conv.2.weight": draw(5, 3, 7, 1)}, "unexpected: layers.2.conv.weight (5, 7, 3), from conv.2.weight"),
        ({"conv.0.weight": None}, "missing: layers.0.conv.weight (5, 7, 3)"),
        (
            {"conv.0.weight": draw(5, 3, 8, 1)},
            "layers.0.conv.weight must be (5, 7, 3), got (5, 8, 3) from conv.0.weight",
        ),
        ({"conv.0.weight": draw(5, 3, 7, 2)}, "conv.0.weight (5, 3, 7, 2) axis 3 must have one element for layers.0"),
        ({"conv.0.weight": draw(5, 3, 7)}, "misshapen: conv.0.weight (5, 3, 7) axis 3 must have one element"),
        ({"fused.2": draw(3, 9, 7)}, "misshapen: fused.2 (3, 9, 7) axis 1 must have two halves for gate.2 (3, 5, 7)"),
        ({"expert.1.7.a": None}, "missing: expert.1.7.a"),
        ({"expert.3.7.a": draw(5, 2)}, "leftover: expert.3.7.a meets no rule"),
        ({"expert.2.7.a": draw(5, 3)}, "must have one shape and dtype, to be joined, unlike expert.2.7.a (5, 3)"),
        ({"left.0.packed": draw(7, 5)}, "left.0.packed (7, 5) must have rows in 3 equal parts for q.left.0 (2, 5)"),
    ],
)
def test_what_does_not_fit_is_named(change, line):
    tensors = {name: x for name, x in (TENSORS | change).items() if x is not None}
    with pytest.raises(ValueError) as error:
        apply_rules(TABLE, tensors, EXPECTED)
    assert line in str(error.value)


def test_all_problems_are_one_error():
    with pytest.raises(ValueError) as error:
        apply_rules(TABLE, {"conv.0.weight": draw(5, 3, 8, 1), "other": draw(2)}, EXPECTED)
    assert str(error.value).splitlines()[0].endswith("1 leftover, 1 misshapen, 10 missing")
    assert len(str(error.value).splitlines()) == 13
    with pytest.raises(ValueError) as error:
        apply_rules(TABLE, {f"other{i}": draw(2) for i in range(30)}, {})
    assert str(error.value).splitlines()[-1] == "  ... and 10 more" and len(str(error.value).splitlines()) == 22


def test_two_rules_for_one_tensor():
    with pytest.raises(ValueError, match=r"ambiguous: a\.0 meets 2 rules"):
        apply_rules([Rule("a.{i}", "b.{i}"), Rule("{x:a|c}.{i}", "d.{x}.{i}")], {"a.0": draw(2)}, {})


def test_two_tensors_for_one_target():
    with pytest.raises(ValueError, match=r"duplicate: c, again from b \(2,\)"):
        apply_rules([Rule("a", "c"), Rule("b", "c")], {"a": draw(2), "b": draw(2)}, {"c": (2,)})


def test_a_join_needs_all_its_parts_in_one_dtype():
    join = invert([Rule("qkv.{i}", ("q.{i}", "k.{i}", "v.{i}"))])
    parts = {f"{x}.0": draw(2, 3) for x in "qkv"}
    with pytest.raises(ValueError, match=r"1 missing\n  missing: k\.0$"):
        apply_rules(join, {name: x for name, x in parts.items() if name != "k.0"}, {})
    with pytest.raises(ValueError, match="one shape and dtype"):
        apply_rules(join, parts | {"k.0": parts["k.0"].astype(mx.float16)}, {"qkv.0": (6, 3)})
    with pytest.raises(ValueError, match="one shape and dtype"):
        apply_rules(join, parts | {"k.0": draw(3, 3)}, {"qkv.0": (7, 3)})


@pytest.mark.parametrize(
    ("source", "target"),
    [("a.{i}", "b"), ("a", "b.{i}"), (("a", "b"), ("c", "d")), ("a.{i}", ("b.{i}", "c")), ("a.{i}", "b.{j}")],
)
def test_a_rule_that_could_not_lead_back_is_refused(source, target):
    with pytest.raises(ValueError, match="a rule must have"):
        Rule(source, target)


def test_names_with_special_characters_are_literal():
    table = [Rule("a.b", "c"), Rule("{x:p+|q}.z", "{x}")]
    moves, problems = plan(table, ["a.b", "axb", "pp.z", "p+.z"])
    assert [move.targets for move in moves] == [("c",), ("p+",)]
    assert problems == [("leftover", "axb meets no rule"), ("leftover", "pp.z meets no rule")]


@st.composite
def tables(draw_):
    """A random table with tensors for it: any order of axes, unit axes dropped, rows split into any parts."""
    table, tensors = [], {}
    for k in range(draw_(st.integers(1, 4))):
        sizes = draw_(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=4))
        layout, rank = [], len(sizes)
        for axis in sorted((a for a, n in enumerate(sizes) if n == 1), reverse=True):
            if rank > 1 and draw_(st.booleans()):
                layout.append(Squeeze(axis))
                rank -= 1
        if draw_(st.booleans()):
            layout.append(Expand(draw_(st.integers(0, rank))))
            rank += 1
        order = draw_(st.permutations(range(rank)))
        layout.append(Permute(tuple(order)))
        rule = Rule(f"{{side:a|b}}.{k}.{{i}}", f"{{i}}.{k}.{{side}}", tuple(layout))
        parts = draw_(st.integers(1, 3))
        if parts > 1:
            rule = Rule(
                rule.source, tuple(f"{p}.{rule.target}" for p in range(parts)), (Permute(tuple(range(len(sizes)))),)
            )
            sizes[0] *= parts
        table.append(rule)
        for side, i in itertools.product("ab", draw_(st.sets(st.integers(0, 12), max_size=2))):
            values = np.arange(np.prod(sizes), dtype=np.float16).reshape(sizes) + i
            tensors[f"{side}.{k}.{i}"] = mx.array(values).astype(draw_(st.sampled_from([mx.float16, mx.int32])))
    return table, tensors


@settings(deadline=None)  # a machine may be busy
@given(tables())
def test_any_table_leads_back(case):
    table, tensors = case
    moves, problems = plan(table, tensors)
    assert not problems
    made = {n: x for m in moves for n, x in zip(m.targets, m([tensors[s] for s in m.sources]), strict=True)}
    out = apply_rules(table, tensors, {name: x.shape for name, x in made.items()})
    shapes = inverse_shapes(table, {name: x.shape for name, x in out.items()})
    same(apply_rules(invert(table), out, shapes), tensors)


def test_thousands_of_names_take_no_time():
    """A mixture of 128 experts in 48 layers: 18,432 names and 384 templates of experts."""
    table = [
        *(
            Rule(f"l.{{i}}.self_attn.{x}_proj.{{leaf:weight|bias}}", f"m.{{i}}.{x}.{{leaf:weight|bias}}")
            for x in "qkvo"
        ),
        *(Rule(tuple(f"l.{{i}}.e.{e}.w{n}.weight" for e in range(128)), f"m.{{i}}.w{n}", (Stack(128),)) for n in "123"),
    ]
    names = [f"l.{i}.e.{e}.w{n}.weight" for i in range(48) for e in range(128) for n in "123"]
    start = time.process_time()
    moves, problems = plan(table, names)
    took = time.process_time() - start
    print(f"\n{len(names)} names in {took:.2f} s", end=" ")
    assert len(moves) == 144 and not problems and took < 1
