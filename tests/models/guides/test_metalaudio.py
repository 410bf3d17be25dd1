"""The documented cross-transformer against the NumPy twin, and what its guide promises or gets wrong."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import check_forward, check_module, draw

from mlx_xformer.models.guides.metalaudio import CrossTransformerConfig, CrossTransformerEncoder, TransformerLayer
from mlx_xformer.reference.models.guides.metalaudio import cross_transformer_encoder, transformer_layer

B, LT, LF, E, H, HIDDEN, N = 2, 7, 11, 15, 3, 13, 2
CONFIG = CrossTransformerConfig(E, H, N, HIDDEN)
WITHOUT_BIASES, ONE = {"attention_bias": False, "ffn_bias": False}, {"num_layers": 1}


def signal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 1.7 + 0.4


def pair(batch=(B,)):
    return signal(*batch, LT, E), signal(*batch, LF, E, seed=1)


def arrays(batch=(B,)):
    return [mx.array(x.astype(np.float32)) for x in pair(batch)]


def encoder(seed=0, **changes):
    module = CrossTransformerEncoder(dataclasses.replace(CONFIG, **changes))
    return module, draw(module, seed)


def joined(module, axis=1):
    """The module with its two outputs behind one another, as the harness differentiates one."""

    class Joined(type(module)):
        def __call__(self, time, freq):
            return mx.concatenate(super().__call__(time, freq), axis=axis)

    module.__class__ = Joined
    return module


def check(module, twin, config, gradient=True):
    """Outputs and gradients of all parameters and both inputs against the twin."""
    check_module(
        joined(module), lambda p, t, f: np.concatenate(twin(p, config, t, f), axis=1), *pair(), gradient=gradient
    )


def differs(a, b):
    return [np.abs(np.array(x) - np.array(y)).max() > 1e-3 for x, y in zip(a, b, strict=True)]


def same(a, b):
    return all((np.array(x) == np.array(y)).all() for x, y in zip(a, b, strict=True))


def give(module, params):
    module.load_weights([(name, mx.array(p.astype(np.float32))) for name, p in params.items()])


# Against the twin


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_dim": None} | ONE, {"activation": "gelu"} | ONE, WITHOUT_BIASES | ONE]
)
def test_encoder(changes):
    config = dataclasses.replace(CONFIG, **changes)
    check(CrossTransformerEncoder(config), cross_transformer_encoder, config)


def test_layer():
    check(TransformerLayer(E, H, HIDDEN), transformer_layer, CONFIG)


def twin_of(params):
    return lambda t, f: cross_transformer_encoder({n: p.astype(t.dtype) for n, p in params.items()}, CONFIG, t, f)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (40, 1)])
def test_any_lengths(lengths):
    module, params = encoder()
    check_forward(module, twin_of(params), signal(B, lengths[0], E), signal(B, lengths[1], E, seed=1))


def test_an_empty_branch():
    """Nothing to attend to gives 0, and out_proj its bias: what time gets when out_proj is closed."""
    module, params = encoder()
    closed = {n: p * 0 if "cross_attn_time.out_proj.weight" in n else p for n, p in params.items()}
    time, freq = arrays()
    out = module(time, freq[:, :0])
    assert out[1].shape == (B, 0, E)
    check_forward(lambda t, f: out[0], lambda t, f: twin_of(closed)(t, f)[0], *pair())
    assert [x.shape for x in module(time[:, :0], freq[:, :0])] == [(B, 0, E)] * 2
    assert [x.shape for x in module(time[:0], freq[:0])] == [(0, LT, E), (0, LF, E)]


# What the guide promises


def test_nothing_comes_through_closed_outputs():
    """With out_proj and linear2 at zero every step adds zero."""
    module, params = encoder()
    closed = {n: p * 0 if ".out_proj." in n or ".linear2." in n else p for n, p in params.items()}
    give(module, closed)
    inputs = arrays()
    assert same(module(*inputs), inputs)


@pytest.mark.parametrize("layer", [True, False])
def test_each_branch_reads_the_other(layer):
    module, _ = encoder()
    module = module.layers[0] if layer else module
    time, freq = arrays()
    out = module(time, freq)
    assert differs(out, module(time, freq[:, ::-1] * 0.5)) == [True, True]
    assert differs(out, module(time[:, ::-1] * 0.5, freq)) == [True, True]


def test_frequencies_attend_to_the_time_of_before():
    """Closing time's cross-attention changes time, and nothing that frequencies see in the same layer."""
    module, params = encoder(num_layers=1)
    time, freq = module(*arrays())
    closed = {n: p * 0 if "cross_attn_time.out_proj" in n else p for n, p in params.items()}
    give(module, closed)
    without = module(*arrays())
    assert differs((time, freq), without) == [True, False]
    assert same([freq], without[1:])


@pytest.mark.parametrize("b", range(B))
def test_a_batch_is_its_items(b):
    module, params = encoder()
    one = [x[b : b + 1] for x in pair()]
    forms = {
        "alone": module,
        "without a batch axis": lambda t, f: [x[None] for x in module(t[0], f[0])],
        "in the batch": lambda t, f: [x[b : b + 1] for x in module(*arrays())],
    }
    for form in forms.values():
        check_forward(form, twin_of(params), *one)


def test_calls_leave_nothing_behind():
    """The first call does the work, the second gives the same bits; inputs and module are as they were."""
    module, params = encoder()
    inputs = arrays()
    kept, attributes = [np.array(x) for x in inputs], str(module)
    first, second = module(*inputs), module(*inputs)
    assert differs(first, inputs) == [True, True]
    assert same(first, second) and same(inputs, kept)
    after = {n: np.array(x) for n, x in tree_flatten(module.parameters())}
    assert str(module) == attributes and after.keys() == params.keys()
    assert all((after[n] == params[n].astype(np.float32)).all() for n in params)


def test_an_output_is_not_an_input():
    module, _ = encoder()
    inputs = arrays()
    kept = [np.array(x) for x in inputs]
    for out in module(*inputs):
        out[:] = 0
    assert same(inputs, kept)


def test_lengths_may_change_from_call_to_call():
    module, _ = encoder()
    first = module(*arrays())
    for length in (1, 8, 64):
        module(mx.array(signal(B, length, E).astype(np.float32)), arrays()[1])
    assert same(first, module(*arrays()))


@pytest.mark.parametrize("size", [1e4, 1e18])
def test_large_values_stay_finite(size):
    """Scores of 1e4 and more, from large projections and from large inputs: magnitude matters, not length."""
    module, params = encoder()
    loud = {n: p * size if "q_proj.weight" in n else p for n, p in params.items()}
    give(module, loud)
    for inputs in (arrays(), [x * size for x in arrays()]):
        assert all(np.isfinite(np.array(out)).all() for out in module(*inputs))


THREADS = """
import sys, threading
sys.path[:0] = sys.argv[1:]
import numpy as np
import test_metalaudio as t
from mlx_xformer import clear_streams_at_thread_end
def run(name):
    clear_streams_at_thread_end()
    work(name)
def work(name):
    module, _ = t.encoder()
    results[name] = [[np.array(x) for x in module(*t.arrays())] for _ in range(20)]
results = {}
threads = [threading.Thread(target=run, args=(name,)) for name in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
work("main")
expected = results["main"][0]
same = [(a == b).all() for runs in results.values() for run in runs for a, b in zip(run, expected, strict=True)]
print(len(same), all(same), flush=True)
"""


def test_threads_with_instances_of_their_own():
    """Two threads and the main one: the same weights give the same bits."""
    command = [sys.executable, "-c", THREADS, str(Path(__file__).parent), str(Path(__file__).parents[2])]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, "120 True\n"), answer.stdout + answer.stderr
