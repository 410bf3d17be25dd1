"""Planted bugs in the mixture of experts: parity.run, as a user runs it, must name each of them."""

import pytest
from support.planted import outcomes, source_of, task
from support.planted_parity import CHECK

MOE, ROUTING, GROUPING, EXPERTS, CONFIG = (
    "nn.moe.layer",
    "nn.moe.routing",
    "nn.moe.grouping",
    "nn.moe.experts",
    "nn.moe.config",
)

# name: (module, source, planted, the operation that must fail)
MUTANTS = {
    "renormalised with one expert": (CONFIG, "self.num_experts_per_tok > 1 if", "True if", "Routing"),
    "never renormalised": (CONFIG, "self.num_experts_per_tok > 1 if", "False if", "Routing"),
    "asked for renormalisation and got none": (
        CONFIG,
        "if self.renormalize is None else self.renormalize",
        "",
        "Routing",
    ),
    "capacity rounded down": (CONFIG, "math.ceil(min(", "math.floor(min(", "MoE"),
    "capacity without k": (CONFIG, "tokens * self.num_experts_per_tok / self.num_experts", "tokens / self.num_experts",
                           "MoE"),
    "one more than the capacity": (ROUTING, "[0] < taken", "[0] <= taken",
                                   "Routing"),
    "the last tokens go first": (
        ROUTING,
        "mx.cumsum(chosen(experts, num_experts), axis=0)",
        "mx.cumsum(chosen(experts, num_experts), axis=0, reverse=True)",
        "MoE",
    ),
    "the token itself not counted": (
        ROUTING,
        "mx.take_along_axis(before, experts, axis=1) - 1",
        "mx.maximum(mx.take_along_axis(before, experts, axis=1) - 2, 0)",
        "MoE",
    ),
    "the worst experts": (ROUTING, "mx.argpartition(-scores, k - 1", "mx.argpartition(scores, k - 1", "Routing"),
    "the worst expert": (ROUTING, "mx.argmax(scores", "mx.argmin(scores", "Routing"),
    "weights have the selection bias": (
        ROUTING,
        "    weights = mx.take_along_axis(scores, experts, axis=-1)",
        "    scores = scores if selection_bias is None else scores + selection_bias\n"
        "    weights = mx.take_along_axis(scores, experts, axis=-1)",
        "Routing",
    ),
    "selection bias ignored": (
        ROUTING,
        "scores if selection_bias is None else scores + selection_bias",
        "scores",
        "Routing",
    ),
    "scale ignored": (ROUTING, "if config.scale != 1:", "if False:", "Routing"),
    "sigmoids not divided by their sum": (
        ROUTING,
        "scores / (scores.sum(axis=-1, keepdims=True) + _TINY)",
        "scores",
        "Routing",
    ),
    "sigmoid's weights softened": (
        ROUTING,
        "config.renormalizes and scores is logits",
        "config.renormalizes",
        "Routing",
    ),
    "all groups": (ROUTING, "if config.groups_per_tok < config.groups:", "if False:", "Routing"),
    "the worst groups": (ROUTING, "mx.argpartition(-values", "mx.argpartition(values", "Routing"),
    "a group of sigmoids is worth its best": (ROUTING, "min(2, config.group_size)", "1", "Routing"),
    "a group of softmax is worth its two best": (ROUTING, "values = grouped.max(axis=-1)",
                                                 "values = mx.topk(grouped, 2, axis=-1).sum(axis=-1)", "Routing"),
    "experts of other groups have a score of 1": (
        ROUTING,
        "mx.array(-mx.inf, scores.dtype)",
        "mx.array(1.0, scores.dtype)",
        "Routing",
    ),
    "the balance loss without E": (
        ROUTING,
        "config.alpha * config.num_experts * (share",
        "config.alpha * (share",
        "Routing",
    ),
    "the balance loss of the tokens taken": (ROUTING, "share = self.load / tokens", "share = self._taken / tokens",
                                             "Routing"),
    "the balance loss of tokens summed": (ROUTING, "self.probabilities.sum(axis=0) / tokens",
                                          "self.probabilities.sum(axis=0)", "Routing"),
    "the balance loss without a gradient": (
        ROUTING,
        "(share * self.probabilities.sum",
        "(share * mx.stop_gradient(self.probabilities).sum",
        "Routing",
    ),
    "the document's loss of all that chose": (
        ROUTING,
        "self.config.num_experts, self.kept).sum",
        "self.config.num_experts, None).sum",
        "Routing",
    ),
    "the z-loss of maxima": (ROUTING, "mx.logsumexp(self.logits, axis=-1)", "mx.max(self.logits, axis=-1)", "Routing"),
    "the z-loss not squared": (ROUTING, "mx.square(mx.logsumexp(self.logits, axis=-1))",
                               "mx.logsumexp(self.logits, axis=-1)", "Routing"),
    "dropped are those kept": (ROUTING, "else (~self.kept).sum()", "else self.kept.sum()", "Routing"),
    "load of those taken": (
        ROUTING,
        "return chosen(self.experts, self.config.num_experts).sum(axis=0)",
        "return chosen(self.experts, self.config.num_experts, self.kept).sum(axis=0)",
        "Routing",
    ),
    "weights without a gradient": (MOE, "weights = routing.weights\n", "weights = mx.stop_gradient(routing.weights)\n",
                                   "MoE"),
    "overflow not weighed": (MOE, "self.overflow_expert(tokens) * over", "self.overflow_expert(tokens) * (over > 0)",
                             "MoE"),
    "overflow of the first choice": (
        MOE,
        "routing.weights).sum(axis=-1, keepdims=True)",
        "routing.weights)[:, :1]",
        "MoE",
    ),
    "overflow of what was kept": (
        MOE,
        "mx.where(routing.kept, mx.array(0.0), routing.weights)",
        "mx.where(routing.kept, routing.weights, mx.array(0.0))",
        "MoE",
    ),
    "full experts take all": (MOE, "if routing.kept is not None and how", "if False and how", "MoE"),
    "shared expert forgotten": (MOE, "            y = y + shared\n", "", "MoE"),
    "shared expert always open": (MOE, 'if "shared_expert_gate" in self:', "if False:", "MoE"),
    "the shared gate is no sigmoid": (
        MOE,
        "shared * mx.sigmoid(self.shared_expert_gate(tokens))",
        "shared * self.shared_expert_gate(tokens)",
        "MoE",
    ),
    "gate and up swapped": (
        EXPERTS,
        "activation(through(self.gate_proj, x), through(self.up_proj, x))",
        "activation(through(self.up_proj, x), through(self.gate_proj, x))",
        "MoE",
    ),
    "biases in order": (EXPERTS, "bias if experts is None else bias[experts]", "bias[: len(y)]", "MoE"),
    "biases of others": (EXPERTS, 'x.astype(mx.float32)[..., None], lhs_indices=experts)[..., 0]\n        return y + '
                         "self.bias[experts]", "x.astype(mx.float32)[..., None], lhs_indices=experts)[..., 0]\n"
                         "        return y + self.bias[experts * 0]", "MoE"),
    "a row too far": (GROUPING, "at = mx.where(place < rows,", "at = mx.where(place <= rows,", "MoE"),
    "blocks begin where they end": (
        GROUPING,
        "mx.concatenate([mx.zeros((1,), ends.dtype), ends[:-1]])",
        "ends",
        "MoE",
    ),
    "blocks of the expert before": (GROUPING, ">= ends).sum", "> ends).sum", "MoE"),
    "the gradient of one choice": (GROUPING, "_below(cotangent)[place].sum(axis=1)", "_below(cotangent)[place][:, 0]",
                                   "MoE"),
    "the gradient of rows not weighed": (GROUPING, "_below(cotangent)[source] * at[:-1, None]",
                                         "_below(cotangent)[source]", "MoE"),
    "the gradient of weights of other tokens": (GROUPING, "_below(y)[place] * cotangent[:, None]",
                                                "_below(y)[place] * cotangent[::-1][:, None]", "MoE"),
    "the gradient of the expert above": (EXPERTS, "(experts <= own).sum(axis=1)", "(experts < own + 2).sum(axis=1)",
                                         "MoE"),
}  # fmt: skip


@pytest.fixture(scope="module")
def caught():
    """What parity said of each mutant, and of the unchanged source."""
    tasks = [("nothing", ROUTING, source_of(ROUTING), "Routing"), ("nothing else", MOE, source_of(MOE), "MoE")]
    return outcomes([*tasks, *(task(name, *mutant) for name, mutant in MUTANTS.items())], CHECK)


def test_the_unchanged_source_passes(caught):
    assert caught["nothing"] is caught["nothing else"] is None
    assert caught.keys() == {"nothing", "nothing else", *MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(caught, name):
    assert caught[name], f"parity passes with {name}"
    assert caught[name].startswith(MUTANTS[name][3])
