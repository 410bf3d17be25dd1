"""Folders of decoders as Hugging Face writes them, and their conversion."""

import json
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget

from mlx_xformer.converters.families import causal_lm as names
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.converters.rules import apply_rules
from mlx_xformer.models.families import load_model, parameter_shapes
from mlx_xformer.reference.models.causal_lm import decoder as twin

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 5))


def tensors(path):
    return read_source(path / "model.safetensors").tensors


def ours(own, state):
    """Tensors of Hugging Face under our names, as float64."""
    arrays = {name: mx.array(x) for name, x in state.items()}
    out = apply_rules(names.rules(own, state), arrays, parameter_shapes("causal_lm", own.to_dict()))
    return {name: np.array(x, np.float64) for name, x in out.items()}


def check_logits(folder, params, own, tokens=TOKENS):
    truth = twin(params, own, tokens), twin({n: x.astype(np.float32) for n, x in params.items()}, own, tokens)
    assert_within_budget(load_model(folder)(mx.array(tokens)), *truth)


SIZES = {
    "vocab_size": 31,
    "hidden_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
    "intermediate_size": 29,
}


def written(report):
    """What a report must say of the tensors before and after, from the files."""
    sides = []
    for path in (report.source, report.out):
        weights = mx.load(str(path / "model.safetensors")).values()
        kinds = Counter({mx.float32: "F32", mx.float16: "F16", mx.uint32: "U32"}[x.dtype] for x in weights)
        sides.append(f"{len(weights)} ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})")
    return f"{sides[0]}, all accounted for, become {sides[1]}\n"


def refused(call, reason, start, folder, lines=1):
    before = sorted(folder.rglob("*"))
    with pytest.raises((ValueError, OSError)) as error:
        call()
    text = str(error.value)
    assert reason in text and text.startswith(str(start)) and len(text.splitlines()) <= lines, text
    assert sorted(folder.rglob("*")) == before


def edited(path, **values):
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **values}))


CHILD = """
import json, re, sys
from pathlib import Path
import mlx_xformer, mlx.core as mx
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.formats.source import read_source

def more(work):
    "The bytes that are resident at most while work() runs, above those before."
    def resident(name):
        return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

source, out, given = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
convert(source, out, dry_run=True, **given)
print(more(lambda: convert(source, out, **given)))
print(more(lambda: [read_source(path).tensors for path in source.glob("model-*.safetensors")]))
"""
