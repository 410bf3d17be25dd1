"""Bugs planted into layers, llm_prep's models and the Transformer: parity catches each and names the operation."""

import pytest
from support.planted import outcomes, source_of, task
from support.planted_parity import CHECK

BLOCKS, CONDITIONING, INPUTS, TRANSFORMER = "nn.transformer", "models.bound", "nn.checks", "models.transformer"
MODEL, CONFIG = "models.guides.llm_prep.model", "models.guides.llm_prep.config"

# name: (module, source, planted, operation)
MUTANTS = {
    "every step on a norm": (BLOCKS, "form(norm(x) if self.config.norm_first else x)", "form(norm(x))", "Layer"),
    "no norm of the sum": (BLOCKS, "return y if self.config.norm_first else norm(y)", "return y", "Layer"),
    "what came in is forgotten": (BLOCKS, "y = x + apply_dropout(", "y = apply_dropout(", "Layer"),
    "causality forgotten": (BLOCKS, "causal=config.causal, window", "causal=False, window", "Layer"),
    "window forgotten": (BLOCKS, "window=config.window, **shared", "window=None, **shared", "Layer"),
    "mask forgotten": (BLOCKS, "self.self_attn(y, mask=mask,", "self.self_attn(y, mask=None,", "Layer"),
    "bias forgotten": (BLOCKS, "bias=bias, cache=cache, key=keys[0]", "cache=cache, key=keys[0]", "Layer"),
    "mask of the memory forgotten": (BLOCKS, "mask=memory_mask, cache=cross_cache", "cache=cross_cache", "Layer"),
    "scale forgotten": (BLOCKS, '"scale": config.scale', '"scale": None', "Layer"),
    "eps of norms forgotten": (BLOCKS, "(self.embed_dim, self.norm_eps)", "(self.embed_dim)", "Layer"),
    "activation forgotten": (
        BLOCKS,
        "return FeedForward(self.embed_dim, self.hidden_dim, self.activation,",
        'return FeedForward(self.embed_dim, self.hidden_dim, "relu",',
        "Layer",
    ),
    "layers from the last": (BLOCKS, "enumerate(layers):", "enumerate(layers[::-1]):", "Stack"),
    "no norm at the end": (BLOCKS, 'return self.norm(x) if "norm" in self else x', "return x", "Stack"),
    "one cache for all layers": (
        BLOCKS,
        "name: of_layers[index]",
        'name: of_layers[0 if name == "cache" else index]',
        "Stack.cached",
    ),
    "one memory for all layers": (
        BLOCKS,
        "name: of_layers[index]",
        'name: of_layers[0 if name == "cross_cache" else index]',
        "Stack.cached",
    ),
    "a step has position 0": (
        CONDITIONING,
        "offset=before - row)",
        "offset=-row)",
        "AutoregressiveTransformerModel.cached",
    ),
    "mask upside down": (INPUTS, "return mask[:, None, None]", "return ~mask[:, None, None]", "EncoderDecoder"),
    "mean over padding": (MODEL, "else mask.astype(y.dtype)", "else mx.ones(mask.shape)", "TransformerModel"),
    "padding is attended to": (MODEL, "self.stack(y, mask=keys, ", "self.stack(y, ", "TransformerModel"),
    "autoregression by name only": (
        MODEL,
        "self.stack = Stack(config.layer(causal=True)",
        "self.stack = Stack(config.layer(causal=False)",
        "AutoregressiveTransformerModel",
    ),
    "a decoder that looks ahead": (
        MODEL,
        "config.layer(causal=True, cross=True)",
        "config.layer(causal=False, cross=True)",
        "EncoderDecoder",
    ),
    "an encoder that does not": (
        MODEL,
        "self.encoder = Stack(config.layer(causal=False)",
        "self.encoder = Stack(config.layer(causal=True)",
        "EncoderDecoder",
    ),
    "one projection for both": (
        MODEL,
        "y = self.decoder_input_proj(",
        "y = self.encoder_input_proj(",
        "EncoderDecoder",
    ),
    "the model's window forgotten": (
        CONFIG,
        "window=self.window if causal else None",
        "window=None",
        "AutoregressiveTransformerModel",
    ),
    "a window for encoders": (
        CONFIG,
        "window=self.window if causal else None",
        "window=self.window",
        "EncoderDecoder",
    ),
    "embeddings without their scale": (TRANSFORMER, "* math.sqrt(config.embed_dim)", "* 1.0", "Transformer"),
    "one table for both sides": (TRANSFORMER, 'self[f"{side}_embed"]', "self.target_embed", "Transformer"),
    "mask of the target forgotten": (
        TRANSFORMER,
        'mask=expand_key_mask("target_mask", target_mask, target.shape),\n            memory',
        "memory",
        "Transformer",
    ),
    "a Transformer that looks ahead": (TRANSFORMER, "causal=decoder,", "causal=False,", "Transformer"),
    "no caches": (TRANSFORMER, "caches=caches,\n            cross", "cross", "Transformer.cached"),
}


@pytest.fixture(scope="module")
def caught():
    """What parity said of each mutant, and of the unchanged source."""
    tasks = [("nothing", BLOCKS, source_of(BLOCKS), "Stack.cached")]
    return outcomes([*tasks, *(task(name, *mutant) for name, mutant in MUTANTS.items())], CHECK)


def test_the_unchanged_source_passes(caught):
    assert caught["nothing"] is None
    assert caught.keys() == {"nothing", *MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(caught, name):
    assert caught[name], f"parity passes with {name}"
    assert caught[name].startswith(MUTANTS[name][3])
