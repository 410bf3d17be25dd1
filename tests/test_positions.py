"""Masks and position tables against the NumPy twin and their formulas."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_xformer import masks, positions
from mlx_xformer.reference import masks as twin_masks
from mlx_xformer.reference import positions as twin


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
    from mlx_xformer.spectral import hann_window

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
