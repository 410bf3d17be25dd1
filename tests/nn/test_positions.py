"""Masks and position tables against the NumPy twin and their formulas."""

import mlx.core as mx
import numpy as np
import pytest
from support.harness import check_forward, check_gradient

from mlx_xformer.nn import masks, positions, rotary
from mlx_xformer.reference.nn import masks as twin_masks
from mlx_xformer.reference.nn import positions as twin


@pytest.mark.parametrize("alignment", ["lower_right", "upper_left"])
@pytest.mark.parametrize(("L", "S"), [(1, 1), (3, 7), (7, 3), (5, 5)])
def test_causal_mask(L, S, alignment):
    expected = [[j <= i + (S - L if alignment == "lower_right" else 0) for j in range(S)] for i in range(L)]
    assert np.array(masks.causal_mask(L, S, alignment=alignment)).tolist() == expected
    assert twin_masks.causal_mask(L, S, alignment=alignment).tolist() == expected


def test_causal_mask_names_an_unknown_alignment():
    with pytest.raises(ValueError, match=r"alignment must be .*, got 'middle'"):
        masks.causal_mask(2, 2, alignment="middle")


@pytest.mark.parametrize("lengths", [[2, 0, 5], mx.array([2, 0, 5])])
def test_padding_mask(lengths):
    expected = [[j < n for j in range(5)] for n in (2, 0, 5)]
    assert np.array(masks.padding_mask(lengths, 5))[:, 0, 0].tolist() == expected
    assert twin_masks.padding_mask(np.array([2, 0, 5]), 5)[:, 0, 0].tolist() == expected


@pytest.mark.parametrize("options", [{}, {"shift": 11}, {"centered": True}, {"max_period": 313.0}])
@pytest.mark.parametrize(("length", "dim"), [(1, 4), (13, 6), (1344, 48)])
def test_sinusoidal_1d(length, dim, options):
    table = np.array(positions.sinusoidal_1d(length, dim, **options))
    expected = twin.sinusoidal_1d(length, dim, **options)
    assert np.abs(table - expected).max() <= 2**-24
    t, i = length - 1, dim // 2 - 1  # one entry by hand: the slowest cosine of the last position
    position = t + options.get("shift", 0) - ((length - 1) / 2 if options.get("centered") else 0)
    assert table[t, i] == pytest.approx(np.cos(position / options.get("max_period", 10000.0)), abs=1e-7)


@pytest.mark.parametrize(("height", "width", "dim"), [(3, 5, 4), (8, 336, 24)])
def test_sinusoidal_2d(height, width, dim):
    table = np.array(positions.sinusoidal_2d(height, width, dim))
    assert np.abs(table - twin.sinusoidal_2d(height, width, dim)).max() <= 2**-24
    # Channels 0, 1 are the sine and cosine of the position in time; half the channels on, in frequency.
    assert table[4, 2, 0] == pytest.approx(np.sin(4)) and table[4, 2, 1] == pytest.approx(np.cos(4))
    assert table[4, 2, dim // 2] == pytest.approx(np.sin(2)) and table[4, 2, dim // 2 + 1] == pytest.approx(np.cos(2))


def test_tables_are_the_caller_s_own():
    """MLX's in-place operators write into the array they are given."""
    from mlx_xformer.nn.spectral import hann_window

    for make in (
        lambda: positions.sinusoidal_1d(5, 8),
        lambda: positions.sinusoidal_2d(3, 5, 8),
        lambda: hann_window(8),
    ):
        before = np.array(make())
        table = make()
        table += 1
        assert (np.array(make()) == before).all() and (np.array(table) != before).all()


def test_padding_mask_refuses_lengths_outside():
    with pytest.raises(ValueError, match=r"lengths must be from 0 to S = 5, got \[2, 6\]"):
        masks.padding_mask([2, 6], 5)
    with pytest.raises(ValueError, match="lengths must be from 0 to S = 5"):
        masks.padding_mask([-1], 5)


@pytest.mark.parametrize("dim", [0, 2, 7])
def test_sinusoidal_1d_refuses(dim):
    with pytest.raises(ValueError, match=f"dim must be even and at least 4, got {dim}"):
        positions.sinusoidal_1d(3, dim)


@pytest.mark.parametrize("dim", [0, 6])
def test_sinusoidal_2d_refuses(dim):
    with pytest.raises(ValueError, match=f"dim must be a multiple of 4, got {dim}"):
        positions.sinusoidal_2d(3, 3, dim)


@pytest.mark.parametrize(("L", "S"), [(1, 1), (1, 7), (5, 7), (7, 7)])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_sliding_mask(L, S, window):
    expected = [[abs(i + S - L - j) < window for j in range(S)] for i in range(L)]
    assert np.array(masks.sliding_mask(L, S, window)).tolist() == expected
    assert twin_masks.sliding_mask(L, S, window).tolist() == expected
    band = masks.sliding_mask(L, S, window) & masks.causal_mask(L, S)
    assert np.array(band.sum(axis=-1)).tolist() == [min(window, i + S - L + 1) for i in range(L)]


@pytest.mark.parametrize("lengths", [3, 0, [2, 0, 7]])
def test_prefix_mask(lengths):
    rows = [lengths] if isinstance(lengths, int) else lengths
    expected = [[[j <= i + 2 or j < n for j in range(7)] for i in range(5)] for n in rows]
    found = np.array(masks.prefix_mask(5, 7, lengths))
    assert found.shape == ((5, 7) if isinstance(lengths, int) else (3, 1, 5, 7))
    assert found.reshape(len(rows), 5, 7).tolist() == expected
    assert (twin_masks.prefix_mask(5, 7, lengths) == found).all()


def test_segment_mask():
    ids, keys = np.array([[0, 0, 1, 2, -1], [3, 1, 1, -1, -1]]), np.array([[0, 1, -1], [1, 3, 3]])
    found = np.array(masks.segment_mask(mx.array(ids)))
    assert found.shape == (2, 1, 5, 5) and (twin_masks.segment_mask(ids) == found).all()
    assert found[0, 0].astype(int).tolist() == [[1, 1, 0, 0, 0]] * 2 + [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0] * 5]
    crossed = np.array(masks.segment_mask(mx.array(ids), mx.array(keys)))
    assert (twin_masks.segment_mask(ids, keys) == crossed).all()
    assert crossed[1, 0].astype(int).tolist() == [[0, 1, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks.sliding_mask(3, 3, 0), "window must be at least 1, got 0"),
        (lambda: masks.prefix_mask(3, 3, 4), r"lengths must be from 0 to S = 3, got \[4\]"),
        (lambda: masks.segment_mask(mx.zeros((2, 3)), mx.zeros((3, 3))), r"one batch, got \(2, 3\) and \(3, 3\)"),
        (lambda: positions.sinusoidal(3, 0), "dim must be at least 1, got 0"),
        (lambda: rotary.Rotary(5), "dims must be a whole number, even and at least 2, got 5"),
        (lambda: rotary.Rotary(4, theta=0.0), "theta must be a number above 0, got 0"),
        (lambda: rotary.Rotary(8)(mx.zeros((1, 1, 3, 6))), "dims must be at most head_dim, 6, got 8"),
        (
            lambda: rotary.Rotary(4)(mx.zeros((1, 1, 3, 6)), positions=mx.arange(4)),
            r"positions must be \(L,\) or \(B, L\) = \(1, 3\), got \(4,\)",
        ),
        (
            lambda: rotary.Rotary(4)(mx.zeros((1, 1, 3, 6)), positions=mx.zeros((2, 3))),
            r"positions must be \(L,\) or \(B, L\) = \(1, 3\), got \(2, 3\)",
        ),
        (lambda: rotary.Rotary(4.0), r"dims must be a whole number, even and at least 2, got 4\.0"),
        (lambda: rotary.Rotary("4"), "dims must be a whole number, even and at least 2, got '4'"),
        (lambda: rotary.Rotary(4)(mx.zeros((1, 1, 3, 4), mx.int32)), "x must be a float, got mlx.core.int32"),
        (lambda: rotary.Rotary(4)(mx.zeros((3, 4))), r"x must be \(batch, heads, .*, got shape \(3, 4\)"),
        (lambda: rotary.Rotary(4)(mx.zeros((1, 1, 3, 4)), offset=1.5), r"offset must be a whole number, got 1\.5"),
        (
            lambda: rotary.Rotary(4)(mx.zeros((1, 1, 3, 4)), offset=mx.array([1, 2])),
            r"offset must be whole numbers, one or \(1,\), got mlx.core.int32 \(2,\)",
        ),
        (
            lambda: rotary.Rotary(4)(mx.zeros((1, 1, 3, 4)), offset=mx.array(1.5)),
            r"offset must be whole numbers, one or \(1,\), got mlx.core.float32 \(\)",
        ),
        (lambda: positions.alibi_bias(0, 3, 3), "num_heads must be at least 1, got 0"),
        (lambda: positions.relative_buckets(3, 3, num_buckets=5), "num_buckets must be .* even .*, got 5"),
        (lambda: positions.relative_buckets(3, 3, max_distance=8), "max_distance must be above 8, got 8"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dim", [1, 2, 7, 16, 512])
def test_sinusoidal(dim):
    """By the formula, for odd widths too; position 0 is 0, 1, 0, 1; a shift turns each pair by one angle."""
    table = np.array(positions.sinusoidal(31, dim), np.float64)
    assert np.abs(table - twin.sinusoidal(31, dim)).max() <= 2**-24
    assert table[0].tolist() == [float(c % 2) for c in range(dim)]
    assert np.abs(np.array(positions.sinusoidal(20, dim, offset=11)) - table[11:]).max() <= 2**-24
    pairs = table[:, : dim // 2 * 2].reshape(31, -1, 2)
    angle = 5 / 10000.0 ** (2 * np.arange(dim // 2) / dim)
    sin, cos = pairs[:-5, :, 0], pairs[:-5, :, 1]
    turned = np.stack([sin * np.cos(angle) + cos * np.sin(angle), cos * np.cos(angle) - sin * np.sin(angle)], axis=-1)
    assert np.abs(turned - pairs[5:]).max(initial=0) <= 3e-7


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [2, 6, 10])
@pytest.mark.parametrize("offset", [0, 37, "rows"])
def test_rotary(interleaved, dims, offset):
    """Offsets through MLX's kernel, explicit positions through the formula: both are the twin's."""
    x = np.random.default_rng(0).normal(size=(3, 2, 5, 10))
    start = np.array([4, 0, 91]) if offset == "rows" else np.full(3, offset)
    at = start[:, None] + np.arange(5)
    turn = rotary.Rotary(dims, theta=313.0, interleaved=interleaved)
    given = mx.array(start) if offset == "rows" else offset
    options = {"dims": dims, "theta": 313.0, "interleaved": interleaved}
    check_forward(lambda x: turn(x, offset=given), lambda x: twin.rotary(x, at, **options), x)
    check_forward(lambda x: turn(x, positions=mx.array(at)), lambda x: twin.rotary(x, at, **options), x)
    check_gradient(lambda x: turn(x, positions=mx.array(at)), lambda x: twin.rotary(x, at, **options), x)
    mixed = np.array([3, 0, 0, 17, 2])  # in any order, shared by the rows
    rows = np.broadcast_to(mixed, (3, 5))
    check_forward(lambda x: turn(x, positions=mx.array(mixed)), lambda x: twin.rotary(x, rows, **options), x)


def test_rotary_in_half_precision_keeps_its_dtype():
    x = mx.random.normal((1, 2, 5, 8)).astype(mx.float16)
    turn = rotary.Rotary(6)
    assert turn(x, positions=mx.arange(5)).dtype == turn(x).dtype == mx.float16
    assert mx.abs(turn(x, positions=mx.arange(5)) - turn(x)).max() <= 2**-8


def test_rotary_scores_see_the_distance_only():
    q, k = mx.random.normal((2, 1, 1, 1, 16))
    turn = rotary.Rotary(16)
    near = turn(q, offset=3) @ turn(k, offset=1).swapaxes(2, 3)
    far = turn(q, offset=503) @ turn(k, offset=501).swapaxes(2, 3)
    assert abs((near - far).item()) < 1e-3 and abs((near - turn(q, offset=9) @ turn(k).swapaxes(2, 3)).item()) > 1e-2


@pytest.mark.parametrize("num_heads", [1, 2, 8, 12, 20])
def test_alibi(num_heads):
    bias = np.array(positions.alibi_bias(num_heads, 4, 7))
    assert np.abs(bias - twin.alibi_bias(num_heads, 4, 7)).max() <= 2**-20
    assert (bias[:, -1, -1] == 0).all() and len(np.unique(bias[:, 0, 0])) == num_heads
    if num_heads == 8:
        assert bias[0, 0].tolist() == [-1.5, -1.0, -0.5, 0.0, -0.5, -1.0, -1.5] and bias[7, 3, 5] == -(2.0**-8)


@pytest.mark.parametrize(("L", "S"), [(1, 1), (3, 7), (7, 3), (150, 200)])
def test_tables_by_distance(L, S):
    """What the tables of all pairs hold, once for each distance."""
    index = np.arange(S)[None] - np.arange(L)[:, None] + L - 1
    assert (np.array(positions.alibi_by_distance(6, L, S))[:, index] == np.array(positions.alibi_bias(6, L, S))).all()
    for bidirectional in (True, False):
        given = {"num_buckets": 32, "max_distance": 128, "bidirectional": bidirectional}
        found = np.array(positions.buckets_by_distance(L, S, **given))
        assert (found[index] == np.array(positions.relative_buckets(L, S, **given))).all()


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("L", "S"), [(300, 300), (1, 211), (7, 13)])
def test_relative_buckets(L, S, bidirectional):
    options = {"num_buckets": 32, "max_distance": 128, "bidirectional": bidirectional}
    found = np.array(positions.relative_buckets(L, S, **options))
    assert (found == twin.relative_buckets(L, S, **options)).all()
    if S == 300:
        row = found[150]
        assert row[150] == 0 and row[149] == 1 and row[151] == (17 if bidirectional else 0)
        assert row[0] == (15 if bidirectional else 31) and row[299] == (31 if bidirectional else 0)


@pytest.mark.parametrize(
    "given", [{}, {"offset": 5}, {"offset": mx.array([3, 7])}, {"positions": mx.array([4, 0, 9])}], ids=str
)
@pytest.mark.parametrize("rotary", [rotary.Rotary(6), rotary.Rotary(4, interleaved=True)], ids=str)
def test_rotary_of_one_head_without_an_axis_of_heads(rotary, given):
    x = mx.random.normal((2, 3, 6), key=mx.random.key(1))
    assert (rotary(x, **given) == rotary(x[:, None], **given)[:, 0]).all()


@pytest.mark.parametrize(
    ("n", "given"), [(5, {}), (3, {"m": 7}), (3, {"m": 7, "offset": 2}), (1, {"m": 4}), (4, {"offset": 3}), (0, {})]
)
def test_create_causal_mask(n, given):
    made = np.array(masks.create_causal_mask(n, **given))
    assert made.dtype == bool and (made == twin_masks.create_causal_mask(n, **given)).all()
    assert made.shape == (n, given.get("m", n + given.get("offset", 0)))
    if "offset" not in given:
        assert (made == np.array(masks.causal_mask(n, given.get("m", n)))).all()


def test_create_causal_mask_refuses():
    with pytest.raises(ValueError, match="offset must be at least 0, got -2"):
        masks.create_causal_mask(5, 3)
