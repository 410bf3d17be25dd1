"""Caches on disk: the format, what is not stored, and what is wrong with a file in one line."""

import copy
import json
import os
import pickle

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_xformer.nn.attention.core import attention
from mlx_xformer.nn.cache import KVCache, load_caches, save_caches

B, H, G, D, DV = 2, 6, 3, 40, 13
ENTRY = "mlx_xformer.caches"
KINDS = [
    {},
    {"bits": 8},
    {"bits": 4, "capacity": 300},
    {"window": 5},
    {"window": 5, "slack": 2, "bits": 8},
    {"window": 5, "keep": 2},
    {"padding": [0, 3]},
    {"padding": [4, 1], "window": 5, "keep": 2, "bits": 4},
    {"padding": [0, 19]},
    {"padding": [20, 20]},
]


def pair(n, seed, dtype=mx.float32):
    rng = np.random.default_rng(seed)
    shapes = (B, G, n, D), (B, G, n, DV)
    return [mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype) for shape in shapes]


def filled(n=17, dtype=mx.float32, **kind):
    cache = KVCache(**kind)
    if n:
        cache.append(*pair(n, 1, dtype))
        cache.append(*pair(1, 2, dtype))
    return cache


def same(a, b):
    """Whether two caches go on alike."""
    assert (a.length, a._longest, a.padding, a._kind) == (b.length, b._longest, b.padding, b._kind)
    assert a.nbytes == b.nbytes or a.length <= min(a.padding)  # what is padding throughout is not stored
    q = mx.array(np.random.default_rng(3).normal(size=(B, H, 2, D)).astype(np.float32))
    for seed in (5, 6):
        views = [cache.append(*pair(2, seed)) for cache in (a, b)]
        outs = [attention(q, view.keys, view.values, **view.options) for view in views]
        assert (outs[0] == outs[1]).all()


def header(path):
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_they_come_back(kind, tmp_path):
    caches = [filled(**kind), filled(n=0, **kind)]
    save_caches(tmp_path / "file", caches, {"prompt": "ä\n", "x": ""})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    found, metadata = load_caches(tmp_path / "file")
    assert metadata == {"prompt": "ä\n", "x": ""}
    for cache, again in zip(caches, found, strict=True):
        same(cache, again)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_copies_and_pickles_go_on_alike(kind, copied):
    for n in (0, 17, 290):
        cache = filled(n=n, **kind)
        same(cache, copied(cache))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [None, 8])
def test_the_dtype_stays(bits, dtype, tmp_path):
    cache = filled(dtype=dtype, bits=bits)
    save_caches(tmp_path / "file", [cache])
    (again,), metadata = load_caches(tmp_path / "file")
    assert metadata == {} and [x.dtype for x in again.arrays] == [x.dtype for x in cache.arrays]
    assert all((x[:, :, :18] == y[:, :, :18]).all() for x, y in zip(cache.arrays, again.arrays, strict=True))
    pickled = pickle.loads(pickle.dumps(cache)).arrays
    assert all(x.dtype == y.dtype and (x == y).all() for x, y in zip(cache.arrays, pickled, strict=True))


def test_only_what_counts_is_stored(tmp_path):
    """mlx-lm 0.32.2 stores 262 KB for 3 tokens."""
    path = tmp_path / "file"
    save_caches(path, [filled(n=2)])
    assert path.stat().st_size < B * G * 3 * (D + DV) * 4 + 800
    shapes, _ = header(path)
    assert shapes == {"0.keys": [B, G, 3, D], "0.values": [B, G, 3, DV]}
    save_caches(path, [filled(n=500, window=10, keep=3, slack=2)])
    assert header(path)[0]["0.keys"] == [B, G, 3 + 9 + 2, D]
    save_caches(path, [filled(padding=[0, 12]), filled(padding=[30, 2], bits=8)])
    shapes, metadata = header(path)
    assert shapes["0.0.keys"] == [1, G, 18, D] and shapes["0.1.keys"] == [1, G, 6, D]
    assert shapes["1.1.values.packed"] == [1, G, 16, 8] and shapes["1.1.keys.scales"] == [1, G, 16, 2]
    assert not any(name.startswith("1.0.") for name in shapes)  # that row has not begun
    told = json.loads(metadata[ENTRY])
    assert told[1] == {
        "window": None, "keep": 0, "slack": 0, "bits": 8, "capacity": None,
        "padding": [30, 2], "length": 18, "longest": 18, "widths": [D, DV],
    }  # fmt: skip


def test_a_file_may_be_replaced_by_what_was_read_from_it(tmp_path):
    path, cache = tmp_path / "file", filled()
    save_caches(path, [cache])
    (again,), _ = load_caches(path)
    save_caches(path, [again])
    path.write_bytes(path.read_bytes()[:100])
    same(cache, again)


def test_saving_changes_nothing(tmp_path):
    for kind in KINDS:
        cache, other = (filled(n=600 if "capacity" not in kind else 17, **kind) for _ in range(2))
        save_caches(tmp_path / "file", [cache])
        same(cache, other)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="file could not be written"):
        save_caches(tmp_path / "missing" / "file", [filled()])
    with pytest.raises(ValueError, match=f"metadata must not have an entry {ENTRY}"):
        save_caches(tmp_path / "file", [filled()], {ENTRY: "x"})
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "file"
    save_caches(path, [filled()])
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_caches(path, [filled(bits=8)])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def changed(facts=None, **tensors):
    """A writer of a file of one windowed cache, with other facts or tensors."""

    def write(path):
        save_caches(path, [filled(window=5, keep=2)])
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        told = json.loads(metadata[ENTRY])
        told[0] |= facts or {}
        arrays = {**arrays, **{f"0.{name}": x for name, x in tensors.items()}}
        arrays = {name: x for name, x in arrays.items() if x is not None}
        mx.save_safetensors(str(path) + ".safetensors", arrays, {ENTRY: json.dumps(told)})
        os.replace(f"{path}.safetensors", path)

    return write


def damaged(path):
    save_caches(path, [filled()])
    path.write_bytes(path.read_bytes()[:-7])


def foreign(path):
    mx.save_safetensors(str(path) + ".safetensors", {"x": mx.zeros(3)}, {"format": "mlx"})
    os.replace(f"{path}.safetensors", path)


def unreadable(path):
    mx.save_safetensors(str(path) + ".safetensors", {"x": mx.zeros(3)}, {ENTRY: "[" * 3})
    os.replace(f"{path}.safetensors", path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("hello"), "not a whole safetensors file"),
        (damaged, "not a whole safetensors file"),
        (foreign, f"no file of caches, its metadata has no {ENTRY}"),
        (unreadable, "a damaged file of caches"),
        (changed(keys=None), "a damaged file of caches: '0.keys' is missing"),
        (changed(more=mx.zeros(3)), "no cache has a tensor 0.more"),
        (changed({"bits": 8}), "'0.keys.packed' is missing"),
        (changed({"bits": "8"}), "'8' is missing"),
        (changed({"window": 0}), "window must be at least 1, got 0"),
        (changed({"window": "5"}), "a damaged file of caches"),
        (changed({"longest": 10**20}), "a damaged file of caches"),
        (changed({"length": 21}), "length must be from 1 to 18"),
        (changed({"length": 17}), "length must be from 1 to 18"),
        (changed({"longest": 10**6}), "length must be from 1 to 1000000"),
        (changed({"widths": [D, DV + 1]}), r"a tensor must be \(2, 3, 6, 14\), got \(2, 3, 6, 13\)"),
        (changed({"widths": 3}), "a damaged file of caches"),
        (changed({"padding": [1, 2]}), "'0.0.keys' is missing"),
        (changed(values=mx.zeros((B, G, 7, DV))), "a tensor must be"),
        (changed(values=mx.zeros((3, G, 6, DV))), "a tensor must be"),
        (changed(values=mx.zeros((B, G, 6, DV), mx.int32)), "a tensor must be"),
        (changed(keys=mx.zeros(3)), "a damaged file of caches"),
    ],
)  # fmt: skip
def test_files_that_are_refused(write, message, tmp_path):
    path = tmp_path / "file"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_caches(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="file: no such file"):
        load_caches(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="not a file"):
        load_caches(tmp_path)
