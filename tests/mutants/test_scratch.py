"""Planted bugs in scratch's models: the test named must fail on each, and passes on the unchanged source."""

import pytest
from support.planted import outcomes, source_of, task

BLOCKS, MODEL = "models.guides.scratch.blocks", "models.guides.scratch.model"
STACK, WHOLE = "test_stack", "test_stack_model"

# name: (module, source, planted, test module, test, its arguments)
MUTANTS = {
    "positions along the batch": (
        MODEL,
        'x = add_positions(x, config.max_len, "target", cache)',
        'x = add_positions(x.swapaxes(0, 1), config.max_len, "target", cache).swapaxes(0, 1)',
        *(WHOLE, "test_t2_1_positions_follow_the_sequence", {"width": 21}),
    ),
    "positions of a cached step from 0": (
        MODEL,
        'x = add_positions(x, config.max_len, "target", cache)',
        'x = add_positions(x, config.max_len, "target", None)',
        *(WHOLE, "test_cached_is_the_full_pass", {"chunks": [1] * 13, "window": None}),
    ),
    "positions of ragged rows from the padding": (
        "conditioning",
        "offset=before - row)",
        "offset=before)",
        *(WHOLE, "test_cached_ragged_rows", {"chunks": [6, 1, 2, 4]}),
    ),
    "scores dropped by default": (
        BLOCKS,
        "if key is None or not self.config.score_dropout:",
        "if key is None:",
        *(STACK, "test_t2_2_dropout_is_of_weights_or_named_of_scores", {}),
    ),
    "biased deviation": (
        BLOCKS,
        "* (self.dims / (self.dims - 1))",
        "",
        *(STACK, "test_t2_3_unbiased_norm", {}),
    ),
    "eps inside the root": (
        BLOCKS,
        "(deviation + self.eps)",
        "mx.sqrt(deviation * deviation + 1e3 * self.eps)",
        *(STACK, "test_t2_3_unbiased_norm", {}),
    ),
    "the residual stream dropped by default": (
        BLOCKS,
        'return x if config.dropout_at == "branches" else',
        "return",
        *(STACK, "test_t2_4_dropout_leaves_the_residual_stream_alone", {}),
    ),
    "no causality": (
        BLOCKS,
        "causal=config.causal",
        "causal=False",
        *(STACK, "test_t2_5_causal_or_not", {}),
    ),
    "mask of self-attention ignored": (
        BLOCKS,
        'given: dict[str, Any] = {"mask": mask, "bias": bias, "cache": cache}',
        'given: dict[str, Any] = {"mask": None, "bias": bias, "cache": cache}',
        *(STACK, "test_t2_6_masks", {}),
    ),
    "mask of the memory ignored": (
        BLOCKS,
        'given = {"mask": memory_mask, "cache": cross_cache}',
        'given = {"mask": None, "cache": cross_cache}',
        *(STACK, "test_padding_of_the_memory_is_hidden", {}),
    ),
    "norms 2 and 3 swapped": (
        BLOCKS,
        "self.cross_attn, self.norm_3(x)",
        "self.cross_attn, self.norm_2(x)",
        *(STACK, "test_order_of_the_steps", {}),
    ),
    "keys of self-attention without a norm": (
        BLOCKS,
        "y = self._attend(self.self_attn, self.norm_1(x), None,",
        "y = self._attend(self.self_attn, self.norm_1(x), x,",
        *(STACK, "test_order_of_the_steps", {}),
    ),
    "no shift": (
        MODEL,
        "return cross_entropy(logits, target[:, 1:],",
        "return cross_entropy(logits, target[:, :-1],",
        *(WHOLE, "test_loss_is_teacher_forced", {}),
    ),
    "padding counts": (
        MODEL,
        "logits, target[:, 1:], self.config.padding_idx)",
        "logits, target[:, 1:], None)",
        *(WHOLE, "test_loss_is_teacher_forced", {}),
    ),
    "padding in the mean": (
        MODEL,
        "/ mx.maximum(mx.sum(counts), 1)",
        "/ counts.size",
        *(WHOLE, "test_loss_is_teacher_forced", {}),
    ),
    "padding is trained": (
        MODEL,
        "mx.stop_gradient(x), x)",
        "x, x)",
        *(WHOLE, "test_t2_6_padding_is_not_trained", {}),
    ),
    "memory ignored": (
        MODEL,
        "x = self.decoder(x, memory, ",
        "x = self.decoder(x, memory if memory is None else memory * 0, ",
        *(WHOLE, "test_t2_7_memory_changes_every_position", {}),
    ),
    "the first positions instead of the last": (
        "nn.transformer",
        "x[:, x.shape[1] - last :]",
        "x[:, :last]",
        *(WHOLE, "test_last_positions_alone", {}),
    ),
    "tokens not looked at": (
        MODEL,
        "self.config.vocab_size if check else None",
        "None",
        *(WHOLE, "test_a_token_beyond_the_vocabulary", {}),
    ),
    "the mask of the model's memory ignored": (
        MODEL,
        '"memory_mask": seen',
        '"memory_mask": None',
        *(WHOLE, "test_padding_of_a_memory_is_not_heard", {}),
    ),
}

CHECK = """
def found(module, test, given):
    import importlib
    try:
        getattr(importlib.import_module(module), test)(**given)
    except BaseException as error:  # what pytest fails with is no Exception
        return f"{type(error).__name__}: {error}"[:300]
"""


@pytest.fixture(scope="module")
def caught():
    """What the test named said of each mutant, and every test of the unchanged source."""
    checks = {mutant[4]: mutant[3:] for mutant in MUTANTS.values()}
    tasks = [(f"unchanged, {name}", BLOCKS, source_of(BLOCKS), *check) for name, check in checks.items()]
    return outcomes([*tasks, *(task(name, *mutant) for name, mutant in MUTANTS.items())], CHECK)


def test_the_unchanged_source_passes(caught):
    assert {said for name, said in caught.items() if name.startswith("unchanged")} == {None}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(caught, name):
    assert caught[name], f"{MUTANTS[name][4]} passes with {name}"
