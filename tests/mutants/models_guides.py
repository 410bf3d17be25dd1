"""The models of the source documents."""

from mutants.runner import Bug, parity, tests

LLM_PREP = "models.guides.llm_prep.model"
LLM_PREP_CONFIG = "models.guides.llm_prep.config"
SCRATCH = "models.guides.scratch.model"
SCRATCH_BLOCKS = "models.guides.scratch.blocks"
METALAUDIO = "models.guides.metalaudio"
T2_3_UNBIASED_NORM = tests("tests/models/guides/test_scratch_blocks.py::test_t2_3_unbiased_norm")
ORDER_OF_THE_STEPS = tests("tests/models/guides/test_scratch_blocks.py::test_order_of_the_steps")
LOSS_IS_TEACHER_FORCED = tests("tests/models/guides/test_scratch.py::test_loss_is_teacher_forced")
ENCODER = tests("tests/models/guides/test_metalaudio.py::test_encoder")

BUGS = [
    Bug(
        "mean over padding",
        LLM_PREP,
        "else mask.astype(y.dtype)",
        "else mx.ones(mask.shape)",
        parity("TransformerModel"),
    ),
    Bug("padding is attended to", LLM_PREP, "self.stack(y, mask=keys, ", "self.stack(y, ", parity("TransformerModel")),
    Bug(
        "autoregression by name only",
        LLM_PREP,
        "self.stack = Stack(config.layer(causal=True)",
        "self.stack = Stack(config.layer(causal=False)",
        parity("AutoregressiveTransformerModel"),
    ),
    Bug(
        "a decoder that looks ahead",
        LLM_PREP,
        "config.layer(causal=True, cross=True)",
        "config.layer(causal=False, cross=True)",
        parity("EncoderDecoder"),
    ),
    Bug(
        "an encoder that does not",
        LLM_PREP,
        "self.encoder = Stack(config.layer(causal=False)",
        "self.encoder = Stack(config.layer(causal=True)",
        parity("EncoderDecoder"),
    ),
    Bug(
        "one projection for both",
        LLM_PREP,
        "y = self.decoder_input_proj(",
        "y = self.encoder_input_proj(",
        parity("EncoderDecoder"),
    ),
    Bug(
        "the model's window forgotten",
        LLM_PREP_CONFIG,
        "window=self.window if causal else None",
        "window=None",
        parity("AutoregressiveTransformerModel"),
    ),
    Bug(
        "a window for encoders",
        LLM_PREP_CONFIG,
        "window=self.window if causal else None",
        "window=self.window",
        parity("EncoderDecoder"),
    ),
    Bug(
        "positions along the batch",
        SCRATCH,
        'x = add_positions(x, config.max_len, "target", cache)',
        'x = add_positions(x.swapaxes(0, 1), config.max_len, "target", cache).swapaxes(0, 1)',
        tests("tests/models/guides/test_scratch.py::test_t2_1_positions_follow_the_sequence"),
    ),
    Bug(
        "positions of a cached step from 0",
        SCRATCH,
        'x = add_positions(x, config.max_len, "target", cache)',
        'x = add_positions(x, config.max_len, "target", None)',
        tests("tests/models/guides/test_scratch.py::test_cached_is_the_full_pass"),
    ),
    Bug(
        "no shift",
        SCRATCH,
        "return cross_entropy(logits, target[:, 1:],",
        "return cross_entropy(logits, target[:, :-1],",
        LOSS_IS_TEACHER_FORCED,
    ),
    Bug(
        "padding counts",
        SCRATCH,
        "logits, target[:, 1:], self.config.padding_idx)",
        "logits, target[:, 1:], None)",
        LOSS_IS_TEACHER_FORCED,
    ),
    Bug("padding in the mean", SCRATCH, "/ mx.maximum(mx.sum(counts), 1)", "/ counts.size", LOSS_IS_TEACHER_FORCED),
    Bug(
        "padding is trained",
        SCRATCH,
        "mx.stop_gradient(x), x)",
        "x, x)",
        tests("tests/models/guides/test_scratch.py::test_t2_6_padding_is_not_trained"),
    ),
    Bug(
        "memory ignored",
        SCRATCH,
        "x = self.decoder(x, memory, ",
        "x = self.decoder(x, memory if memory is None else memory * 0, ",
        tests("tests/models/guides/test_scratch.py::test_t2_7_memory_changes_every_position"),
    ),
    Bug(
        "the first positions instead of the last",
        "nn.transformer",
        "x[:, x.shape[1] - last :]",
        "x[:, :last]",
        tests("tests/models/guides/test_scratch.py::test_last_positions_alone"),
    ),
    Bug(
        "tokens not looked at",
        SCRATCH,
        "self.config.vocab_size if check else None",
        "None",
        tests("tests/models/guides/test_scratch.py::test_a_token_beyond_the_vocabulary"),
    ),
    Bug(
        "the mask of the model's memory ignored",
        SCRATCH,
        '"memory_mask": seen',
        '"memory_mask": None',
        tests("tests/models/guides/test_scratch.py::test_padding_of_a_memory_is_not_heard"),
    ),
    Bug(
        "scores dropped by default",
        SCRATCH_BLOCKS,
        "if key is None or not self.config.score_dropout:",
        "if key is None:",
        tests("tests/models/guides/test_scratch_blocks.py::test_t2_2_dropout_is_of_weights_or_named_of_scores"),
    ),
    Bug("biased deviation", SCRATCH_BLOCKS, "* (self.dims / (self.dims - 1))", "", T2_3_UNBIASED_NORM),
    Bug(
        "eps inside the root",
        SCRATCH_BLOCKS,
        "(deviation + self.eps)",
        "mx.sqrt(deviation * deviation + 1e3 * self.eps)",
        T2_3_UNBIASED_NORM,
    ),
    Bug(
        "the residual stream dropped by default",
        SCRATCH_BLOCKS,
        'return x if config.dropout_at == "branches" else',
        "return",
        tests("tests/models/guides/test_scratch_blocks.py::test_t2_4_dropout_leaves_the_residual_stream_alone"),
    ),
    Bug(
        "no causality",
        SCRATCH_BLOCKS,
        "causal=config.causal",
        "causal=False",
        tests("tests/models/guides/test_scratch_blocks.py::test_t2_5_causal_or_not"),
    ),
    Bug(
        "mask of self-attention ignored",
        SCRATCH_BLOCKS,
        'given: dict[str, Any] = {"mask": mask, "bias": bias, "cache": cache}',
        'given: dict[str, Any] = {"mask": None, "bias": bias, "cache": cache}',
        tests("tests/models/guides/test_scratch_blocks.py::test_t2_6_masks"),
    ),
    Bug(
        "mask of the memory ignored",
        SCRATCH_BLOCKS,
        'given = {"mask": memory_mask, "cache": cross_cache}',
        'given = {"mask": None, "cache": cross_cache}',
        tests("tests/models/guides/test_scratch_blocks.py::test_padding_of_the_memory_is_hidden"),
    ),
    Bug(
        "norms 2 and 3 swapped",
        SCRATCH_BLOCKS,
        "self.cross_attn, self.norm_3(x)",
        "self.cross_attn, self.norm_2(x)",
        ORDER_OF_THE_STEPS,
    ),
    Bug(
        "keys of self-attention without a norm",
        SCRATCH_BLOCKS,
        "y = self._attend(self.self_attn, self.norm_1(x), None,",
        "y = self._attend(self.self_attn, self.norm_1(x), x,",
        ORDER_OF_THE_STEPS,
    ),
    Bug(
        "sequential cross update",
        METALAUDIO,
        (
            "normed_time, normed_freq = self.norm_time_cross(time), self.norm_freq_cross(freq)\n"
            "        time = time + self.cross_attn_time(normed_time, normed_freq)\n"
            "        freq = freq + self.cross_attn_freq(normed_freq, normed_time)"
        ),
        (
            "time = time + self.cross_attn_time(self.norm_time_cross(time), self.norm_freq_cross(freq))\n"
            "        freq = freq + self.cross_attn_freq(self.norm_freq_cross(freq), self.norm_time_cross(time))"
        ),
        ENCODER,
    ),
    Bug(
        "time attends to itself twice",
        METALAUDIO,
        "self.cross_attn_time(normed_time, normed_freq)",
        "self.cross_attn_time(normed_time)",
        ENCODER,
    ),
    Bug(
        "freq attends to itself twice",
        METALAUDIO,
        "self.cross_attn_freq(normed_freq, normed_time)",
        "self.cross_attn_freq(normed_freq)",
        ENCODER,
    ),
    Bug(
        "queries and keys change places",
        METALAUDIO,
        "self.cross_attn_freq(normed_freq, normed_time)",
        "self.cross_attn_time(normed_freq, normed_time)",
        ENCODER,
    ),
    Bug(
        "keys and values not normed",
        METALAUDIO,
        "self.cross_attn_time(normed_time, normed_freq)",
        "self.cross_attn_time(normed_time, freq)",
        ENCODER,
    ),
    Bug("norm of another step", METALAUDIO, "self.norm_time_cross(time)", "self.norm_time_self(time)", ENCODER),
    Bug("norm of the other branch", METALAUDIO, "self.norm_freq_ffn(freq)", "self.norm_time_ffn(freq)", ENCODER),
    Bug("no norm", METALAUDIO, "self.ffn_time(self.norm_time_ffn(time))", "self.ffn_time(time)", ENCODER),
    Bug("no residual", METALAUDIO, "freq = freq + self.ffn_freq(", "freq = self.ffn_freq(", ENCODER),
    Bug(
        "no residual of attention",
        METALAUDIO,
        "time = time + self.self_attn_time(",
        "time = self.self_attn_time(",
        ENCODER,
    ),
    Bug("feed-forward of the other branch", METALAUDIO, "self.ffn_freq(self.norm", "self.ffn_time(self.norm", ENCODER),
    Bug("exact GELU", METALAUDIO, "activation=config.activation", 'activation="gelu"', ENCODER),
    Bug(
        "first layer only",
        METALAUDIO,
        "for layer in self.layers:",
        "for layer in self.layers[:1] * len(self.layers):",
        ENCODER,
    ),
]
