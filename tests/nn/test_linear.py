"""Products of linear layers against NumPy: many rows, few, the one of a step; half precision; packed matrices."""

import pickle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from support.harness import as32, assert_within_budget, check_gradient, signal

from mlx_xformer.backend import products
from mlx_xformer.backend.linux import blas
from mlx_xformer.backend.linux import products as linux_products
from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig
from mlx_xformer.nn import layers, linear
from mlx_xformer.text.generation import generate


def plain(x, weight, bias=0.0):
    return x @ weight.T + bias


@pytest.mark.parametrize("shape", [(7,), (1, 7), (1, 1, 7), (2, 3, 7), (9, 7), (2, 0, 7), (3001, 7)])
@pytest.mark.parametrize("biased", [False, True])
def test_product(shape, biased):
    arrays = [signal(*shape), signal(5, 7, seed=1), *([signal(5, seed=2)] if biased else [])]
    assert_within_budget(products.product(*map(mx.array, as32(arrays))), plain(*arrays), plain(*as32(arrays)))
    if 0 not in shape and len(shape) > 1 and shape[0] < 100:
        check_gradient(products.product, plain, *arrays)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("rows", "one_row"), [(1, False), (1, True), (2, True), (8, True)])
def test_products_of_few_rows_take_pieces_of_the_matrix(monkeypatch, rows, one_row, workers):
    """Equal pieces, shared out among workers where the matrix is large; the whole where its rows have no divisor."""
    monkeypatch.setattr(blas, "workers", workers)
    monkeypatch.setattr(blas, "one_row", one_row)
    monkeypatch.setattr(linux_products, "_SHARE", 2**12)
    monkeypatch.setattr(linux_products, "_LARGE_ONE_ROW", 2**12)
    for size in (3, 96, 1031, 33 * 47):
        x, weight = signal(rows, 67), signal(size, 67, seed=1)
        truth, near = plain(x, weight), plain(*as32([x, weight]))
        assert_within_budget(products.product(*map(mx.array, as32([x, weight]))), truth, near)
    packed = mx.quantize(mx.array(signal(1031, 128, seed=1).astype(np.float32)), group_size=32, bits=4)
    monkeypatch.setattr(products, "_LARGE_PACKED", 2**8)
    x = mx.array(signal(min(rows, 2), 128).astype(np.float32))
    whole = mx.quantized_matmul(x, *packed, transpose=True, group_size=32, bits=4)
    assert (products.quantized_product(x, *packed, group_size=32, bits=4) == whole).all()


def layer(bias=True, seed=0):
    made = linear.Linear(67, 31, bias=bias)
    made.weight = mx.array(signal(31, 67, seed=seed + 1).astype(np.float32))
    if bias:
        made.bias = mx.array(signal(31, seed=seed + 2).astype(np.float32))
    return made


def check(made, x):
    arrays = [x, *(np.array(made[name], np.float64) for name in ("weight", "bias") if name in made)]
    out = made(mx.array(x.astype(np.float32)))
    assert out.shape == (*x.shape[:-1], 31)
    assert_within_budget(out, plain(*arrays), plain(*as32(arrays)))


@pytest.mark.parametrize("shape", [(67,), (1, 67), (1, 1, 67), (1, 1, 1, 67), (5, 67), (1, 5, 67), (11, 67), (0, 67)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer(shape, bias):
    made = layer(bias)
    for seed in (0, 1):
        check(made, signal(*shape, seed=seed))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_layer_with_other_numbers(name):
    made, x = layer(), signal(1, 1, 67)
    check(made, x)
    made[name] = made[name] * 2 - 1
    check(made, x)
    made[name][:13] = made[name][:13] - 3  # in place
    check(made, x)
    made.update(layer(seed=7).parameters())
    check(made, x)


def small():
    sizes = {"vocab_size": 31, "embed_dim": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 37}
    return CausalLM(CausalLMConfig(**sizes))


def change(model):
    """In place."""
    for module in (model.lm_head, model.model.layers[1].self_attn.out_proj, model.model.layers[0].mlp.up_proj):
        module.weight[5:] = module.weight[5:] * -3


def test_weights_changed_in_place_count_from_the_next_call_on():
    """Between two generations, while one of the same model is open, and for the next step of one that is begun."""

    def made(model):
        return [(token.id, token.logprob) for token in generate(model, [3, 5, 7], max_tokens=9, logprobs=True)]

    def copied(model):
        other = small()
        other.update(tree_map(mx.array, model.parameters()))
        return other

    model, row = small(), mx.array(signal(1, 24).astype(np.float32))
    first, size = made(model), len(pickle.dumps(model.parameters()))
    change(model)
    assert made(model) == made(copied(model)) != first

    still_open = generate(model, [3, 5, 7], max_tokens=9)
    next(still_open), next(still_open)
    before, caches = copied(model), [model.make_caches() for _ in range(2)]
    for reader, some in zip((model, before), caches, strict=True):
        reader(mx.array([[3, 5, 7, 11]]), caches=some)
        reader(mx.array([[2]]), caches=some)
    change(model)
    assert made(model) == made(copied(model))
    assert mx.array_equal(model.lm_head(row), copied(model).lm_head(row))
    assert not mx.array_equal(model.lm_head(row), before.lm_head(row))
    steps = [reader(mx.array([[4]]), caches=some) for reader, some in zip((model, copied(model)), caches, strict=True)]
    assert mx.array_equal(*steps)
    still_open.close()
    assert len(pickle.dumps(model.parameters())) == size


def test_gradients_of_one_row():
    made, x = layer(), mx.array(signal(1, 1, 67).astype(np.float32))

    def loss(x, several=False):
        y = made(mx.repeat(x, 9, axis=1))[:, 4:5] if several else made(x)
        return mx.square(y).sum()

    found = [
        [mx.grad(form)(x), *(g for _, g in tree_flatten(nn.value_and_grad(made, form)(x)[1]))]
        for form in (loss, lambda x: loss(x, several=True))
    ]
    for a, b in zip(*found, strict=True):
        assert mx.abs(a - b).max() <= 1e-5 * mx.abs(a).max()


class Adapted(nn.Module):
    """A layer with another around it, as LoRA puts it there: it has no weight of its own."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def __call__(self, x):
        return self.linear(x) * 3


@pytest.mark.parametrize("rows", [1, 5])
def test_a_network_of_adapted_layers(rows):
    network, x = layers.FeedForward(16, 37, "relu", bias=False), mx.array(signal(1, rows, 16).astype(np.float32))
    before = network(x)
    network.linear2 = Adapted(network.linear2)
    assert mx.allclose(network(x), 3 * before, rtol=1e-5)


def test_a_half_precision_layer():
    made = layer()
    made.set_dtype(mx.bfloat16)
    x = mx.array(signal(1, 1, 67).astype(np.float32))
    for given in (x, x.astype(mx.bfloat16)):
        out = made(given)
        truth = plain(*(np.array(y.astype(mx.float32), np.float64) for y in (given, made.weight, made.bias)))
        assert out.dtype == given.dtype
        assert np.abs(np.array(out.astype(mx.float32)) - truth).max() <= (2**-7 if given is not x else 1e-6) * 30


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_product_in_half_precision(dtype):
    for rows in (1, 5, 67):
        x, weight = (
            mx.array(signal(*s, seed=i).astype(np.float32)).astype(dtype) for i, s in enumerate([(rows, 37), (5, 37)])
        )
        out = products.product(x, weight)
        truth = np.array(x.astype(mx.float32), np.float64) @ np.array(weight.astype(mx.float32), np.float64).T
        assert out.dtype == dtype
        assert (
            np.abs(np.array(out.astype(mx.float32)) - truth).max()
            <= 2 * float(mx.finfo(dtype).eps) * np.abs(truth).max()
        )


@pytest.mark.parametrize("rows", [1, 2, 3, 67])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_quantized_product(rows, bits, dtype):
    x = mx.array(signal(rows, 64).astype(np.float32)).astype(dtype)
    packed = mx.quantize(mx.array(signal(5, 64, seed=1).astype(np.float32)).astype(dtype), group_size=32, bits=bits)
    bias = mx.array(signal(5, seed=2).astype(np.float32)).astype(dtype)
    out = products.quantized_product(x, *packed, bias, group_size=32, bits=bits)
    scales, biases = (y.astype(mx.float32) for y in packed[1:])
    weight = np.array(mx.dequantize(packed[0], scales, biases, group_size=32, bits=bits), np.float64)
    truth = np.array(x.astype(mx.float32), np.float64) @ weight.T + np.array(bias.astype(mx.float32), np.float64)
    eps = 1e-6 if dtype == mx.float32 else 2 * float(mx.finfo(dtype).eps)
    assert out.dtype == dtype and np.abs(np.array(out.astype(mx.float32)) - truth).max() <= eps * np.abs(truth).max()
