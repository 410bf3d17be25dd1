"""The causal language model."""

from mutants.runner import Bug, tests

MODEL = "models.causal_lm.model"
CONFIG = "models.causal_lm.config"
LLAMA = tests("tests/models/test_causal_lm.py::test_logits_and_gradients[llama]")
GEMMA_3 = tests("tests/models/test_causal_lm.py::test_logits_and_gradients[gemma 3]")
GEMMA_2 = tests("tests/models/test_causal_lm.py::test_logits_and_gradients[gemma 2]")
QWEN3 = tests("tests/models/test_causal_lm.py::test_logits_and_gradients[qwen3]")
PARAMETERS = tests("tests/models/test_causal_lm.py::test_which_projections_have_biases_and_which_layers_are_mixtures")

BUGS = [
    Bug("no residual", MODEL, "            x = x + y\n", "            x = y\n", LLAMA),
    Bug("no residual of the network", MODEL, 'return x + self._feed(self["post', 'return self._feed(self["post', LLAMA),
    Bug(
        "norm of another step",
        MODEL,
        'self._feed(self["post_attention_layernorm"](x), routings)',
        'self._feed(self["input_layernorm"](x), routings)',
        LLAMA,
    ),
    Bug("no norm at the end", MODEL, "x = self.model.norm(x)", "x = x", LLAMA),
    Bug(
        "biases of queries only",
        MODEL,
        "bias=config.attention_bias",
        "bias=config.attention_bias[:1]",
        PARAMETERS,
    ),
    Bug(
        "norm before the sum",
        MODEL,
        "x = x + self.post_attention_layernorm(y)",
        "x = self.post_attention_layernorm(x + y)",
        GEMMA_3,
    ),
    Bug(
        "sandwich norms change places",
        MODEL,
        "self.pre_feedforward_layernorm(x)",
        "self.post_feedforward_layernorm(x)",
        GEMMA_3,
    ),
    Bug(
        "gains without their 1",
        MODEL,
        "RMSNorm(dims, config.norm_eps, plus_one=config.norm_plus_one)",
        "RMSNorm(dims, config.norm_eps)",
        GEMMA_3,
    ),
    Bug("gains of heads without their 1", MODEL, "if config.qk_norm and config.norm_plus_one:", "if False:", GEMMA_3),
    Bug("embeddings not scaled", MODEL, "if self.config.embed_scale is None", "if True", GEMMA_3),
    Bug("scale of the scores", MODEL, "scale=config.attention_scale", "scale=None", GEMMA_2),
    Bug("scores not capped", MODEL, "softcap=config.attention_softcap", "softcap=None", GEMMA_2),
    Bug("logits not capped", MODEL, "y if cap is None", "y if True", GEMMA_2),
    Bug("the other activation", MODEL, "config.hidden_dim, config.activation,", 'config.hidden_dim, "silu",', GEMMA_2),
    Bug("norms' own eps", MODEL, "RMSNorm(dims, config.norm_eps,", "RMSNorm(dims, 1e-2,", QWEN3),
    Bug("eps of heads", MODEL, "norm_eps=config.norm_eps", "norm_eps=1e-2", QWEN3),
    Bug(
        "heads normed one by one",
        MODEL,
        '"rms_whole" if config.qk_norm == "whole" else ',
        "",
        tests("tests/models/test_causal_lm.py::test_logits_and_gradients[olmoe]"),
    ),
    Bug(
        "what the mixture was given",
        MODEL,
        "        return y[0]\n",
        "        return y[0] + x\n",
        tests("tests/models/test_causal_lm.py::test_logits_and_gradients[mixtral]"),
    ),
    Bug(
        "first positions",
        "nn.transformer",
        "x[:, x.shape[1] - last :]",
        "x[:, :last]",
        tests("tests/models/test_causal_lm.py::test_only_the_last_positions"),
    ),
    Bug(
        "caches of the wrong layers",
        "nn.transformer",
        "name: of_layers[index]",
        'name: of_layers[-1 - index if name == "cache" else index]',
        tests("tests/models/test_causal_lm.py::test_caches_change_nothing"),
    ),
    Bug("one rotary base", CONFIG, "if self.local_rope_theta is not None and", "if False and", GEMMA_3),
    Bug(
        "rotary not scaled",
        CONFIG,
        "self.rope_theta, scaling=self.rope_scaling",
        "self.rope_theta",
        tests("tests/models/test_causal_lm.py::test_logits_and_gradients[qwen2, yarn]"),
    ),
    Bug("local and global change places", CONFIG, '== "local" else None', '== "global" else None', GEMMA_3),
    Bug(
        "dense layers and mixtures change places",
        CONFIG,
        "index not in self.dense_layers",
        "index in [0, 1]",
        PARAMETERS,
    ),
]
