"""Conversions hold one tensor, or one layer's, at a time, in both directions and from every kind of file."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.oracle import save_torch

from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.layouts import ZeroPart
from mlx_xformer.converters.precision import Repacking
from mlx_xformer.converters.rules import Rule, plan
from mlx_xformer.converters.stored import hold_array
from mlx_xformer.converters.streaming import stream_moves
from mlx_xformer.models.causal_lm.model import Quantization
from mlx_xformer.storage.checkpoint import read_checkpoint

E, HIDDEN, LAYERS = 512, 2048, 8


def encoder(layers=LAYERS, embed_dim=E, hidden_dim=HIDDEN):
    """The state dict of a torch.nn.TransformerEncoder."""
    shapes = {}
    for start in (f"layers.{index}." for index in range(layers)):
        shapes |= {f"{start}self_attn.in_proj_weight": (3 * embed_dim, embed_dim)}
        shapes |= {f"{start}self_attn.in_proj_bias": (3 * embed_dim,)}
        shapes |= {f"{start}self_attn.out_proj.weight": (embed_dim, embed_dim)}
        shapes |= {f"{start}self_attn.out_proj.bias": (embed_dim,)}
        shapes |= {f"{start}linear1.weight": (hidden_dim, embed_dim), f"{start}linear1.bias": (hidden_dim,)}
        shapes |= {f"{start}linear2.weight": (embed_dim, hidden_dim), f"{start}linear2.bias": (embed_dim,)}
        shapes |= {f"{start}norm{n}.{leaf}": (embed_dim,) for n in (1, 2) for leaf in ("weight", "bias")}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


CHILD = """
import json, re, sys
from pathlib import Path
import mlx_xformer
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.formats.source import read_source

def more(work):
    "The bytes that are resident at most while work() runs, above those before."
    def resident(name):
        return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

folder, settings = Path(sys.argv[1]), {"num_heads": 8}
for file in ("a.safetensors", "a.pt"):
    convert(folder / file, folder / file[2:], settings=settings, dry_run=True)
    print(more(lambda: convert(folder / file, folder / file[2:], settings=settings)))
print(more(lambda: convert(folder / "pt", folder / "back", to="pytorch")))
kept = []
print(more(lambda: kept.append(read_source(folder / "a.pt").tensors)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells")
def test_memory_is_that_of_a_few_tensors(tmp_path):
    """There from two kinds of file, and back; to hold all tensors takes what they hold, so the measure works."""
    state = encoder()
    save_file(state, tmp_path / "a.safetensors")
    save_torch(tmp_path / "a.pt", state)
    whole, largest = sum(x.nbytes for x in state.values()), max(x.nbytes for x in state.values())
    del state
    environment = {**os.environ, "MLX_XFORMER_MALLOC": "0"}  # what is freed is given back
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], env=environment, capture_output=True, text=True,
                          check=True, timeout=120)  # fmt: skip
    *peaks, control = map(int, done.stdout.split())
    print("\nMiB in all, of the largest, to convert, to hold:", *(f"{n / 2**20:.0f}" for n in (whole, largest, *peaks,
                                                                                                control)))  # fmt: skip
    assert max(peaks) <= 6 * largest < whole / 4 and control >= 0.9 * whole


def test_progress_of_any_family(tmp_path):
    """Called before every tensor that is written, and at the end."""
    save_file(encoder(2, 6, 5), tmp_path / "a.safetensors")
    calls = []
    convert(
        tmp_path / "a.safetensors", tmp_path / "out", settings={"num_heads": 3}, progress=lambda *n: calls.append(n)
    )
    total = len(read_checkpoint(tmp_path / "out").weights)
    assert calls == [(done, total) for done in range(total + 1)] and total > 20


def test_a_dry_run_reads_no_tensor(tmp_path):
    """A file whose zip is damaged behind its head is planned; it is refused, and nothing left, when it is written."""
    state = encoder(2, 6, 5)
    path = save_torch(tmp_path / "a.pt", state)
    content = state["layers.1.linear2.weight"].tobytes()
    whole = path.read_bytes()
    assert whole.count(content) == 1
    path.write_bytes(whole.replace(content, content[::-1]))
    settings = {"num_heads": 3}
    report = convert(path, tmp_path / "out", settings=settings, dry_run=True)
    assert report.parameters == sum(x.size for x in state.values()) and not report.written
    with pytest.raises(ValueError, match=r"a\.pt: the zip is truncated or damaged .*CRC"):
        convert(path, tmp_path / "out", settings=settings)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_warnings_name_the_source(tmp_path):
    state = encoder(1, 6, 5)
    state["layers.0.norm1.weight"][2] = np.nan
    save_file(state, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "out", settings={"num_heads": 3})
    assert report.warnings == ("layers.0.norm1.weight: 1 of 6 values are not finite",)


def test_every_source_is_read_once_and_layers_are_repacked_as_a_whole():
    reads = []

    def stored(name, x):
        held = hold_array(x)
        return type(held)(held.dtype, held.shape, lambda: reads.append(name) or x)

    rules = [Rule("{x:a|b}.w", ("{x}.q.weight", "{x}.k.weight")), Rule("{x:a|b}.{p:q|k}.s", "{x}.{p}.bias")]
    arrays = {"a.w": mx.ones((4, 32)), "b.w": mx.ones((4, 32)), "b.q.s": mx.ones((2,)), "a.q.s": mx.ones((2,))}
    tensors = {name: stored(name, x) for name, x in arrays.items()}
    moves, problems = plan(rules, tensors)
    assert not problems
    repack = Repacking(None, Quantization(4, 32))
    names = [name for name, _ in stream_moves(moves, tensors, {}, repack)]
    assert sorted(reads) == sorted(arrays) and reads.index("a.q.s") < reads.index("b.w")
    leaves = ("bias", "weight", "scales", "biases")
    assert sorted(names) == sorted(f"{x}.{p}.{leaf}" for x in "ab" for p in "qk" for leaf in leaves[p == "k" :])


def test_values_that_a_layout_refuses_are_found_when_they_are_read():
    rules = [Rule("x", "y", (ZeroPart(2, 0),))]
    moves, _ = plan(rules, ["x"])
    with pytest.raises(ValueError, match=r"1 misshapen\n.* x \(4,\) part 1 of its 2 parts of rows .* for y \(2,\)"):
        list(stream_moves(moves, {"x": hold_array(mx.ones((4,)))}, {"y": (2,)}))
