"""MoE: what it is equal to, that its forms agree, that its router learns, what it refuses. Its values and gradients are
parity's."""

import dataclasses
import math
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_xformer.backend import dispatch
from mlx_xformer.nn.layers import FeedForward, GatedFeedForward
from mlx_xformer.nn.moe import FFNConfig, MoE, MoEConfig, balanced_bias, experts, grouping, route
from mlx_xformer.nn.moe import layer as moe
from mlx_xformer.parity.cases.moe import CONFIGS
from mlx_xformer.reference.nn import moe as twin

D, H, E, T = 7, 11, 5, 23
KINDS = {
    "gated": {},
    "gated, biased": {"activation": "gelu_tanh", "bias": True},
    "plain": {"gated": False, "activation": "gelu"},
    "plain, biased": {"gated": False, "activation": "relu", "bias": True},
}
LAYOUTS = ("gather", "sorted", "dispatch", "blocks")
EPS = 2.0**-23


def made(seed=0, **options):
    """A MoE whose parameters are drawn: no bias is 0."""
    mx.random.seed(seed)
    layer = MoE(MoEConfig(**{"embed_dim": D, "hidden_dim": H, "num_experts": E, **options}))
    drawn = [(name, mx.random.normal(x.shape) * max(0.3, x.shape[-1] ** -0.5)) for name, x in flat(layer)]
    layer.update(tree_unflatten(drawn))
    return layer


def flat(module):
    return tree_flatten(module.parameters())


def signal(*shape, seed=1):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def network(layer, kind, expert=None):
    """An expert, or the overflow expert, as a FeedForward or a GatedFeedForward."""
    given = {"activation": "silu", "bias": False, "gated": True, **kind}
    alone = (GatedFeedForward if given.pop("gated") else FeedForward)(D, H, **given)
    source = layer.overflow_expert if expert is None else layer.experts
    params = [(name, x if expert is None else x[expert]) for name, x in flat(source)]
    alone.update(tree_unflatten(params))
    return alone


def tie(layer):
    """Gives every expert the matrices of the first."""
    layer.experts.update(tree_unflatten([(n, mx.broadcast_to(x[:1], x.shape)) for n, x in flat(layer.experts)]))


def near(actual, expected, eps=64 * EPS):
    """Sums of D and H products are good to a few of these units, of the largest."""
    actual, expected = np.array(actual, np.float64), np.array(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= eps * np.abs(expected).max(), np.abs(actual - expected).max()


def forced(monkeypatch, how):
    monkeypatch.setattr(moe, "layout", lambda *_, **__: how)


def as_gpu(monkeypatch, gpu=True):
    """Takes the forms of a GPU."""
    monkeypatch.setattr(dispatch, "on_cpu", lambda: not gpu)


# Identities


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [None, T, 1.0, 2 * T])
def test_one_expert_with_room_for_all_is_the_network(kind, capacity):
    layer, x = made(num_experts=1, capacity=capacity, overflow="expert", **KINDS[kind]), signal(T, D)
    y, routing = layer(x)
    near(y, network(layer, KINDS[kind], 0)(x))
    assert routing.kept is None and routing.dropped.item() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3])
def test_capacity_0_is_the_overflow_expert(kind, k):
    layer = made(num_experts_per_tok=k, renormalize=True, capacity=0, overflow="expert", **KINDS[kind])
    y, routing = layer(signal(T, D))
    near(y, network(layer, KINDS[kind])(signal(T, D)))
    assert routing.dropped.item() == T * k


def test_capacity_0_that_drops_is_0():
    y, routing = made(num_experts_per_tok=2, capacity=0)(signal(T, D))
    assert not y.any() and routing.dropped.item() == 2 * T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [None, 3])
def test_tied_experts_are_the_network(kind, capacity):
    """Also with a capacity, where the overflow expert is tied too: what overflows is applied with its weight."""
    layer = made(num_experts_per_tok=3, capacity=capacity, overflow="expert", **KINDS[kind])
    tie(layer)
    alone, x = network(layer, KINDS[kind], 0), signal(T, D)
    if capacity is not None:
        layer.overflow_expert.update(alone.parameters())
    near(layer(x)[0], alone(x))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("selection_bias", [False, True])
def test_renormalised_weights_sum_to_1(router, selection_bias):
    routing = made(num_experts_per_tok=3, router=router, selection_bias=selection_bias).route(signal(T, D))
    near(routing.weights.sum(axis=-1), np.ones(T), 8 * EPS)
    near(routing.probabilities.sum(axis=-1), np.ones(T), 8 * EPS)
    assert len({tuple(sorted(row)) for row in routing.experts.tolist()}) > 1
    assert all(len(set(row)) == 3 for row in routing.experts.tolist())


def test_selection_bias_chooses_and_does_not_weigh():
    layer = made(num_experts_per_tok=2, router="sigmoid", selection_bias=True, renormalize=False)
    layer.selection_bias = mx.array([0.0, 9.0, 0.0, 9.0, 0.0])
    routing = layer.route(signal(T, D))
    assert {tuple(sorted(row)) for row in routing.experts.tolist()} == {(1, 3)}
    scores = mx.sigmoid(layer.router(signal(T, D)))
    near(routing.weights, mx.take_along_axis(scores, routing.experts, axis=1))
    assert "selection_bias" not in dict(tree_flatten(layer.trainable_parameters()))


def test_groups_of_softmax_are_worth_their_best_and_of_sigmoid_their_two_best():
    logits = mx.log(mx.array([[0.4, 0.01, 0.3, 0.29]]))
    options = {"embed_dim": D, "hidden_dim": H, "num_experts": 4, "groups": 2}
    by_best = route(logits, MoEConfig(**options, router="softmax"))
    by_two = route(mx.array([[2.0, -3.0, 1.5, 1.4]]), MoEConfig(**options, router="sigmoid"))
    assert by_best.experts.tolist() == [[0]] and by_two.experts.tolist() == [[2]]


def test_underflowing_sigmoids_give_no_nan():
    config = MoEConfig(D, H, E, 2, router="sigmoid")
    routing = route(mx.full((3, E), -200.0) - mx.arange(E), config)
    assert mx.isfinite(routing.weights).all() and mx.isfinite(routing.balance_loss)


# Paths

OPTIONS = {name: options for name, options in CONFIGS.items() if options.get("capacity") != 0}


def gradients(layer, x):
    """Of the output and the losses, by x and every parameter."""

    def loss(params, x):
        layer.update(tree_unflatten(list(params.items())))
        y, routing = layer(x)
        return (y * mx.sin(mx.arange(y.size).reshape(y.shape) + 0.3)).sum() + routing.loss

    params = dict(flat(layer))
    by_params, by_x = mx.grad(loss, argnums=(0, 1))(params, x)
    layer.update(tree_unflatten(list(params.items())))
    return {**by_params, "x": by_x}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("gpu", [False, True])
def test_forms_agree_forward_and_gradient(monkeypatch, name, gpu):
    """Each form of the products, and those that a GPU takes, run here."""
    layer, x = made(**OPTIONS[name]), signal(T, D)
    if gpu:
        as_gpu(monkeypatch)
    found = {}
    for how in LAYOUTS:
        forced(monkeypatch, how)
        found[how] = {"y": layer(x)[0], **gradients(layer, x)}
    scale = max(mx.abs(g).max().item() for name, g in found["gather"].items() if name != "y")
    for how in LAYOUTS[1:]:
        near(found[how].pop("y"), found["gather"]["y"])
        for key, g in found[how].items():
            assert mx.abs(g - found["gather"][key]).max().item() <= 64 * EPS * scale, (how, key)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_blocks_hold_any_load(rows):
    """Also where all go to one expert, and where one gets none."""
    for choices in ([[0]] * T, [[t % E] for t in range(T)], [[t % 2 * 3, 4] for t in range(T)], [[1, 4, 0]]):
        chosen = mx.array(choices)
        table = grouping.blocks(chosen, E, rows)
        source, place = np.array(table.source), np.array(table.place)
        owners = np.array(table.experts)
        assert len(set(place.ravel().tolist())) == chosen.size and place.max() < len(source)
        for (t, j), at in np.ndenumerate(place):
            assert source[at] == t and owners[at // rows] == choices[t][j]
        assert (source == len(choices)).sum() == len(source) - chosen.size


def test_what_is_chosen_by_size(monkeypatch):
    def chosen(tokens, half=False, training=False, **options):
        return moe.layout(MoEConfig(256, 512, 8, 2, **options), tokens, half=half, training=training)

    as_gpu(monkeypatch, False)
    assert [chosen(tokens) for tokens in (1, 4, 512)] == ["gather", "gather", "blocks"]
    assert chosen(512, capacity=1.25) == chosen(512, capacity=1.25, training=True) == "dispatch"
    assert chosen(512, capacity=4.0) == "blocks"  # which has a quarter of the rows
    assert chosen(1, training=True) != "gather"
    assert [chosen(tokens, half=True) for tokens in (1, 512)] == ["gather", "blocks"]
    assert chosen(8, half=True) == "dispatch"  # as no group is smaller than what all tokens fill
    as_gpu(monkeypatch)
    assert [chosen(tokens) for tokens in (1, 32)] == ["gather", "sorted"]
    assert chosen(512, capacity=1.25) == "sorted" and chosen(512, capacity=1.25, training=True) == "dispatch"


@pytest.mark.parametrize("bits", [None, 4])
def test_sorted_rows_have_the_strides_of_rows(monkeypatch, bits):
    """MLX on CUDA counts rows by the stride of the axis before the last, which indexing with None sets to 1."""
    layer, x, seen = made(num_experts_per_tok=2, embed_dim=64, hidden_dim=32).eval(), signal(T, 64), []
    name = "gather_mm" if bits is None else "gather_qmm"
    if bits:
        nn.quantize(layer.experts, group_size=32, bits=bits)
    function = getattr(mx, name)
    monkeypatch.setattr(mx, name, lambda x, *given, **options: seen.append(x) or function(x, *given, **options))
    as_gpu(monkeypatch)
    forced(monkeypatch, "sorted")
    mx.eval(layer(x)[0], seen)
    assert [x.shape for x in seen] == [(2 * T, 1, 64), (2 * T, 1, 64), (2 * T, 1, 32)]
    assert [memoryview(x).strides for x in seen] == [(256, 256, 4), (256, 256, 4), (128, 128, 4)]


def test_few_tokens_and_many_give_the_same():
    """Without capacity a token's output depends on itself alone: cached decoding equals the full pass."""
    layer, x = made(num_experts_per_tok=2, shared_dim=13).eval(), signal(199, D)
    whole = layer(x)[0]
    for some in (slice(0, 1), slice(3, 5), slice(20, 140)):
        near(layer(x[some])[0], whole[some])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("how", [*LAYOUTS, None])
def test_half_precision(monkeypatch, dtype, how):
    layer = made(num_experts_per_tok=2, capacity=7, bias=True)
    layer.set_dtype(dtype)
    x = signal(T, D).astype(dtype)
    if how is not None:
        forced(monkeypatch, how)
    y, routing = layer(x)
    assert y.dtype == dtype and routing.weights.dtype == mx.float32
    expected = twin.moe({n: np.array(p.astype(mx.float32), np.float64) for n, p in flat(layer)},
                        np.array(x.astype(mx.float32), np.float64), layer.config)[0]  # fmt: skip
    near(y.astype(mx.float32), expected, 4 * mx.finfo(dtype).eps)


@pytest.mark.slow  # g++ compiles each for 10 s
@pytest.mark.parametrize("options", [{}, {"capacity": 1.25, "overflow": "expert"}, {"selection_bias": True}])
@pytest.mark.parametrize("tokens", [1, 61])
def test_compiles_forward_and_gradient(options, tokens):
    layer, x = made(num_experts_per_tok=2, **options), signal(tokens, D)

    def loss(params, x):
        layer.update(params)
        y, routing = layer(x)
        return mx.square(y).sum() + routing.loss

    params = layer.parameters()
    step = mx.value_and_grad(loss)
    value, grads = step(params, x)
    compiled_value, compiled_grads = mx.compile(step)(params, x)
    near(compiled_value, value)
    scale = max(mx.abs(g).max().item() for _, g in tree_flatten(grads))
    for (_, a), (_, b) in zip(tree_flatten(compiled_grads), tree_flatten(grads), strict=True):
        assert mx.abs(a - b).max().item() <= 64 * EPS * scale
    layer.update(params)
    layer.eval()
    near(mx.compile(lambda x: layer(x)[0])(x), layer(x)[0])


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (2, 0), (3, 2, 5)])
def test_any_leading_axes(shape):
    layer = made(num_experts_per_tok=2, capacity=1.5, overflow="expert", shared_dim=13, shared_gate=True)
    x = signal(*shape, D)
    y, routing = layer(x)
    tokens = math.prod(shape)
    assert y.shape == x.shape and routing.logits.shape == (tokens, E)
    assert mx.isfinite(routing.loss) and routing.load.sum().item() == 2 * tokens
    if tokens:
        near(y.reshape(-1, D), layer(x.reshape(-1, D))[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_no_tokens_are_nothing_and_cost_nothing(name, training):
    """Of every option: MLX takes no argmax and no logarithm of sums of nothing."""
    layer = made(**CONFIGS[name]).train(training)
    x = mx.zeros((2, 0, D))
    y, routing = layer(x)
    assert y.shape == (2, 0, D) and routing.loss.item() == 0 and routing.dropped.item() == 0
    assert not any(g.any().item() for g in gradients(layer, x).values())


# Quantized experts


def dequantized(layer):
    """The same MoE with the values that the packed matrices stand for."""
    plain = MoE(layer.config)
    for name, module in layer.named_modules():
        if isinstance(module, experts.QuantizedExpertLinear):
            weight = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            plain.experts[name.rsplit(".", 1)[1]].weight = weight
            if "bias" in module:
                plain.experts[name.rsplit(".", 1)[1]].bias = module.bias
    plain.router = layer.router
    return plain


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_experts_are_those_of_their_values(monkeypatch, bits, dtype):
    layer = made(embed_dim=64, hidden_dim=128, num_experts_per_tok=2, bias=True)
    layer.set_dtype(dtype)
    nn.quantize(layer, 64, bits, class_predicate=lambda _, m: isinstance(m, experts.ExpertLinear))
    assert isinstance(layer.experts.up_proj, experts.QuantizedExpertLinear)
    assert layer.experts.up_proj.weight.shape == (E, 128, 64 * bits // 32)
    plain, x = dequantized(layer), signal(T, 64).astype(dtype)
    forced(monkeypatch, "dispatch")
    expected = plain(x)[0].astype(mx.float32)
    for gpu in (False, True):
        as_gpu(monkeypatch, gpu)
        for how in LAYOUTS:
            forced(monkeypatch, how)
            y = layer(x)[0]
            assert y.dtype == dtype
            near(y.astype(mx.float32), expected, 64 * EPS if dtype == mx.float32 else 8 * 2.0**-7)


# Losses and balancing


def logits_to(experts, num_experts, by=20.0):
    return mx.array(np.eye(num_experts, dtype=np.float32)[experts] * by)


@pytest.mark.parametrize("alpha", [0.01, 0.7])
def test_a_collapsed_router_costs_alpha_e_and_a_balanced_one_alpha(alpha):
    config = MoEConfig(D, H, E, alpha=alpha)
    collapsed = route(logits_to([3] * 20, E, 60.0), config)
    balanced = route(logits_to([t % E for t in range(20)], E, 60.0), config)
    near(collapsed.balance_loss, alpha * E)
    near(balanced.balance_loss, alpha)
    assert collapsed.load.tolist() == [0, 0, 0, 20, 0] and balanced.load.tolist() == [4] * 5


def test_two_choices_cost_twice():
    config = MoEConfig(D, H, E, 2, alpha=0.3)
    uniform = route(mx.zeros((20, E)) + 1e-6 * signal(20, E), config)
    near(uniform.balance_loss, 2 * 0.3, 1e-5)


@pytest.mark.parametrize("options", [{}, {"router": "sigmoid"}, {"num_experts_per_tok": 2, "z_alpha": 0.4}])
def test_finite_differences_confirm_the_gradient_of_the_losses(options):
    """By the twin in float64, along one direction of the router's matrix."""
    layer, x = made(alpha=0.5, **options), signal(T, D)

    def loss(weight):
        layer.router.weight = weight
        return layer.route(x).loss

    weight = layer.router.weight
    grad = np.array(mx.grad(loss)(weight), np.float64)
    layer.router.weight = weight
    params = {name: np.array(p, np.float64) for name, p in flat(layer)}
    direction = np.random.default_rng(5).normal(size=grad.shape)

    def at(step):
        moved = {**params, "router.weight": params["router.weight"] + step * direction}
        routing = twin.route(moved, np.array(x, np.float64), layer.config)
        return twin.balance_loss(routing, layer.config) + twin.z_loss(routing, layer.config)

    expected = (at(1e-6) - at(-1e-6)) / 2e-6
    assert abs(expected) > 1e-4
    assert abs((grad * direction).sum() - expected) <= 2e-5 * np.linalg.norm(grad) * np.linalg.norm(direction)


@pytest.mark.parametrize("k", [1, 2])
def test_finite_differences_confirm_the_router_s_gradient(k):
    """T1.12: with one expert a token and its weight divided by itself, the router would not learn."""
    layer, x = made(num_experts_per_tok=k), signal(T, D)

    def loss(weight):
        layer.router.weight = weight
        return layer(x)[0].sum()

    weight = layer.router.weight
    grad = np.array(mx.grad(loss)(weight), np.float64)
    layer.router.weight = weight
    params = {name: np.array(p, np.float64) for name, p in flat(layer)}
    direction = np.random.default_rng(5).normal(size=grad.shape)

    def at(step):
        moved = {**params, "router.weight": params["router.weight"] + step * direction}
        return twin.moe(moved, np.array(x, np.float64), layer.config)[0].sum()

    expected = (at(1e-6) - at(-1e-6)) / 2e-6
    assert abs(expected) > 1e-2
    assert abs((grad * direction).sum() - expected) <= 2e-5 * np.linalg.norm(grad) * np.linalg.norm(direction)


def test_balancing_without_a_loss_evens_the_load():
    layer = made(num_experts_per_tok=2, router="sigmoid", router_bias=True, selection_bias=True)
    layer.selection_bias, layer.router.bias = mx.zeros(E), mx.array([1.0, 0.6, 0.1, -0.4, -0.9])
    x = signal(997, D)
    before = layer.route(x).load
    for _ in range(300):
        layer.selection_bias = balanced_bias(layer.selection_bias, layer.route(x).load, 0.01)
    after = layer.route(x).load
    assert before.max().item() > 1.3 * 2 * 997 / E and after.max().item() < 1.1 * 2 * 997 / E
    new = balanced_bias(mx.array([0.3, 0.2, 0.1]), mx.array([1, 6, 5]), 0.25)
    assert np.allclose(new, [0.55, -0.05, -0.15])


# The traps of llm_prep


def test_t1_12_the_documents_loss_does_not_balance():
    """It is alpha whatever the router does, falls with overflow, and has no gradient; the default is none of these."""
    spread, one = logits_to([t % E for t in range(20)], E, 3.0), logits_to([3] * 20, E, 3.0)
    spread, one = (x + 0.1 * signal(20, E) for x in (spread, one))
    options = {"embed_dim": D, "hidden_dim": H, "num_experts": E, "num_experts_per_tok": 2, "alpha": 0.3}
    document, switch = (MoEConfig(**options, balance=balance) for balance in ("document", "switch"))
    for logits in (spread, one):
        near(route(logits, document).balance_loss, 0.3)
        grads = [mx.grad(lambda x, c=c: route(x, c).balance_loss)(logits) for c in (document, switch)]
        assert mx.abs(grads[0]).max().item() < 1e-7 < 1e-4 < mx.abs(grads[1]).max().item()
    assert route(one, switch).balance_loss.item() > 1.5 * route(spread, switch).balance_loss.item()
    capped = dataclasses.replace(document, capacity=3)
    assert route(one, capped).balance_loss.item() < 0.6 * route(spread, capped).balance_loss.item()


def test_t1_12_losses_are_arrays_with_gradients():
    layer = made(z_alpha=0.1)
    routing = layer.route(signal(T, D))
    for loss in (routing.balance_loss, routing.z_loss, routing.loss):
        assert isinstance(loss, mx.array) and loss.shape == () and loss.item() > 0


def test_t1_13_a_factor_is_of_what_an_expert_gets_on_average():
    """A quarter of it drops three quarters of the choices even of a balanced router; 1.25 of it none."""
    logits = logits_to([t % E for t in range(100)], E)
    for factor, taken in ((0.25, 5), (1.0, 20), (1.25, 20)):
        config = MoEConfig(D, H, E, capacity=factor)
        routing = route(logits, config)
        assert routing.dropped.item() == 100 - E * taken and config.slots(100) == math.ceil(20 * factor)


def test_t1_13_a_count_is_no_factor():
    assert MoEConfig(D, H, E, capacity=1).slots(100) == 1 and MoEConfig(D, H, E, capacity=1.0).slots(100) == 20
    assert MoEConfig(D, H, E, capacity=1e308).slots(100) == 100 and MoEConfig(D, H, E, capacity=1e308).slots(0) == 0
    assert MoEConfig(D, H, E, capacity=500).slots(100) == 100 == MoEConfig(D, H, E, capacity=99.0).slots(100)


def test_t1_13_a_mixture_without_experts_is_refused():
    with pytest.raises(ValueError, match="num_experts must be at least 1 with use_moe, got 0"):
        FFNConfig(D, H, use_moe=True)
    layer = FFNConfig(D, H, use_moe=True, num_experts=3, topk=2, capacity=1.25, alpha=0.2).make()
    assert (layer.config.alpha, layer.config.capacity, layer.config.activation) == (0.2, 1.25, "relu")
    assert {"overflow_expert", "router"} <= set(layer) and "bias" in layer.router
    assert isinstance(FFNConfig(D, H).make(), FeedForward)


def test_t1_14_capacity_makes_outputs_depend_on_the_batch():
    """A row changes with the rows before it, not with those behind; without capacity with none."""
    for capacity, depends in ((3, True), (None, False)):
        layer = made(num_experts_per_tok=2, capacity=capacity)
        a, b = signal(1, 9, D, seed=2), signal(1, 9, D, seed=3)
        alone, behind = layer(b)[0][0], layer(mx.concatenate([a, b]))[0][1]
        first = layer(mx.concatenate([b, a]))[0][0]
        assert (mx.abs(alone - behind).max().item() > 0.05) == depends
        near(first, alone)
    assert "depend on the tokens before it" in " ".join(MoE.__doc__.split())


def test_t1_15_a_layer_keeps_nothing_of_a_call():
    layer = made(num_experts_per_tok=2, capacity=3, overflow="expert")
    before = {name: np.array(x) for name, x in flat(layer)}
    x = signal(T, D)
    first, _ = layer(x)
    layer(signal(5, D, seed=9))
    assert mx.array_equal(layer(x)[0], first)
    assert before.keys() == dict(flat(layer)).keys()
    assert all(np.array_equal(x, before[name]) for name, x in flat(layer))


class Recorded(nn.Module):
    """Remembers what another is called with."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self._calls = inner, []

    def __call__(self, x):
        self._calls.append(x.shape)
        return self.inner(x)


def test_t1_16_the_overflow_expert_is_applied_once():
    """With the summed weight, where several of a token's experts are full."""
    layer = made(num_experts_per_tok=3, capacity=2, overflow="expert", renormalize=False)
    inner, x = layer.overflow_expert, signal(T, D)
    layer.overflow_expert = Recorded(inner)
    _, routing = layer(x)
    assert layer.overflow_expert._calls == [(T, D)]
    assert ((~routing.kept).sum(axis=1) > 1).any()
    layer.experts.update(tree_unflatten([(name, mx.zeros_like(p)) for name, p in flat(layer.experts)]))
    over = (routing.weights * ~routing.kept).sum(axis=1, keepdims=True)
    near(layer(x)[0], inner(x) * over)


def test_nothing_that_is_not_finite_reaches_dropped_tokens():
    """An expert's row of infinities stays with its token."""
    layer, x = made(num_experts_per_tok=1, capacity=2), signal(T, D)
    expected, routing = layer(x)
    first = int(np.array(routing.experts)[:, 0].argmin())
    bad = mx.where(mx.arange(T)[:, None] == first, mx.inf, x)
    y, after = layer(bad)
    same = ~np.isnan(np.array(after.logits)).any(axis=1)
    dropped = ~np.array(after.kept)[:, 0] & same
    assert dropped.any() and not np.array(y)[dropped].any()


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embed_dim": 0}, "embed_dim must be a whole number from 1 to 1000000, got 0"),
        ({"hidden_dim": -3}, "hidden_dim must be a whole number from 1 to 10000000, got -3"),
        ({"num_experts": 0}, "num_experts must be a whole number from 1 to 10000, got 0"),
        ({"num_experts": 2.0}, "num_experts must be a whole number from 1 to 10000, got 2.0"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be a whole number from 1 to 10000, got 0"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok must be at most num_experts, 5, got 6"),
        ({"activation": "relu"}, "activation must be one of silu, gelu_tanh, got 'relu'"),
        ({"activation": "tanh", "gated": False}, "activation must be one of gelu, gelu_tanh, relu, silu, got 'tanh'"),
        ({"router": "top"}, "router must be one of softmax, sigmoid, got 'top'"),
        ({"overflow": "next"}, "overflow must be one of drop, expert, got 'next'"),
        ({"balance": "none"}, "balance must be one of switch, document, got 'none'"),
        ({"capacity": -1}, "capacity must be a finite number from 0, got -1"),
        ({"capacity": -0.5}, "capacity must be a finite number from 0, got -0.5"),
        ({"capacity": math.nan}, "capacity must be a finite number from 0, got nan"),
        ({"capacity": math.inf}, "capacity must be a finite number from 0, got inf"),
        ({"capacity": True}, "capacity must be a finite number from 0, got True"),
        ({"capacity": "1"}, "capacity must be a finite number from 0, got '1'"),
        ({"alpha": -0.1}, "alpha must be a finite number from 0, got -0.1"),
        ({"alpha": math.nan}, "alpha must be a finite number from 0, got nan"),
        ({"z_alpha": math.inf}, "z_alpha must be a finite number from 0, got inf"),
        ({"scale": 0.0}, "scale must be a number above 0, got 0.0"),
        ({"groups": 2}, "groups must divide num_experts, 5, got 2"),
        ({"groups": 0}, "groups must be a whole number from 1 to 10000, got 0"),
        ({"groups": 5, "groups_per_tok": 6}, "groups_per_tok must be at most groups, 5, got 6"),
        (
            {"groups": 5, "groups_per_tok": 2, "num_experts_per_tok": 3},
            "groups_per_tok must hold num_experts_per_tok, 3, got 2 of 1 experts",
        ),
        ({"shared_dim": -1}, "shared_dim must be a whole number from 0 to 10000000, got -1"),
        ({"gated": "no"}, "gated must be true or false, got 'no'"),
        ({"bias": 1}, "bias must be true or false, got 1"),
        ({"router_bias": None}, "router_bias must be true or false, got None"),
        ({"selection_bias": "no"}, "selection_bias must be true or false, got 'no'"),
        ({"shared_dim": 3, "shared_gate": "no"}, "shared_gate must be true or false, got 'no'"),
        ({"renormalize": "no"}, "renormalize must be true or false, got 'no'"),
        ({"alpha": 10**400}, f"alpha must be a finite number from 0, got {str(10**400)[:80]}"),
        ({"shared_gate": True}, "shared_gate must be False without shared_dim, got True"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(options, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        MoEConfig(**{"embed_dim": D, "hidden_dim": H, "num_experts": E, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embed_dim": 0}, "embed_dim must be a whole number from 1 to 1000000, got 0"),
        ({"embed_dim": 7.5}, "embed_dim must be a whole number from 1 to 1000000, got 7.5"),
        ({"hidden_dim": "11"}, "hidden_dim must be a whole number from 1 to 10000000, got '11'"),
        ({"use_moe": "no"}, "use_moe must be true or false, got 'no'"),
        ({"use_moe": True, "num_experts": "3"}, "num_experts must be a whole number from 0 to 10000, got '3'"),
        ({"use_moe": True, "num_experts": -3}, "num_experts must be a whole number from 0 to 10000, got -3"),
        ({"use_moe": True, "num_experts": 3, "topk": 0}, "topk must be a whole number from 1 to 10000, got 0"),
        ({"use_moe": True, "num_experts": 3, "topk": 4}, "topk must be from 1 to num_experts, 3, got 4"),
        ({"use_moe": True, "num_experts": 3, "capacity": -1}, "capacity must be a finite number from 0, got -1"),
        ({"use_moe": True, "num_experts": 3, "alpha": math.nan}, "alpha must be a finite number from 0, got nan"),
    ],
)
def test_ffn_config_names_what_does_not_fit(options, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        FFNConfig(**{"embed_dim": D, "hidden_dim": H, **options})


@pytest.mark.parametrize("shape", [(T, D + 1), (D - 1,), (2, 3, 1), ()])
def test_an_input_of_another_width_is_named(shape):
    with pytest.raises(ValueError, match=rf"^x must be \(\.\.\., embed_dim\), 7 wide, got {re.escape(str(shape))}$"):
        made()(mx.zeros(shape))
