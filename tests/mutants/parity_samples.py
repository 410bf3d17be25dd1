"""What the samples of parity find that no other table asks them for: samplers, resampling, new weights, packed layers,
whole recordings, and the layers of every family on small models."""

from mutants.runner import Bug, parity

SAMPLERS, RESAMPLING = "text.samplers", "audio.resampling"
OPTIONS, SEGMENTS = "separation.options", "separation.segments"
ATTENTION, LINEAR, LAYERS, EXPERTS = "nn.attention.kinds", "nn.linear", "nn.layers", "nn.moe.experts"
PRODUCTS, SCRATCH, METALAUDIO = "backend.products", "models.guides.scratch.model", "models.guides.metalaudio"

BUGS = [
    Bug("the likeliest kept alone", SAMPLERS, "mx.min(mx.topk(logits,", "mx.max(mx.topk(logits,", parity("keep_top_k")),
    Bug("a token too few", SAMPLERS, "axis=-1) - probabilities", "axis=-1)", parity("keep_top_p")),
    Bug("a larger part of the likeliest", SAMPLERS, "+ math.log(p)", "+ math.log(p) / 2", parity("keep_min_p")),
    Bug(
        "negative logits divided",
        SAMPLERS,
        "mx.where(logits > 0, logits / penalty, logits * penalty)",
        "logits / penalty",
        parity("penalize"),
    ),
    Bug(
        "padding is token 0",
        SAMPLERS,
        "mx.where(history < 0, size, history)",
        "mx.maximum(history, 0)",
        parity("penalize"),
    ),
    Bug("cold is hot", SAMPLERS, "/ max(temperature, _TINY)", "* temperature", parity("make_sampler")),
    Bug("one number for all positions", SAMPLERS, "[seed, history.shape[1]]", "[seed, 0]", parity("make_sampler")),
    Bug("no penalty", SAMPLERS, "logits = penalize(", "penalize(", parity("make_sampler")),
    Bug("cubic interpolation", RESAMPLING, 'to_rate, quality="VHQ").T', 'to_rate, quality="QQ").T', parity("resample")),
    Bug(
        "a narrow distribution",
        ATTENTION,
        "math.sqrt(6 / (given + made))",
        "math.sqrt(3 / (given + made))",
        parity("initialize"),
    ),
    Bug(
        "outputs for inputs",
        ATTENTION,
        'given**-0.5 if name == "out"',
        'made**-0.5 if name == "out"',
        parity("initialize"),
    ),
    Bug("a bias that is kept", ATTENTION, "mx.zeros_like(projection.bias)", "projection.bias", parity("initialize")),
    Bug("packed without a bias", LINEAR, 'self.get("bias"))\n', "None)\n", parity("QuantizedLinear")),
    Bug(
        "packed without offsets",
        PRODUCTS,
        "mx.dequantize(weight, scales, biases,",
        "mx.dequantize(weight, scales, biases * 0,",
        parity("QuantizedLinear"),
    ),
    Bug(
        "a table of positive codes",
        LAYERS,
        "packed: Any = (self.weight, self.scales, self.biases)",
        "packed: Any = (self.weight, self.scales, -self.biases)",
        parity("QuantizedEmbedding"),
    ),
    Bug(
        "one packed expert for all",
        EXPERTS,
        "rhs_indices=experts, transpose=True, **options))",
        "rhs_indices=experts * 0, transpose=True, **options))",
        parity("MoE.packed"),
    ),
    Bug("hard cross-fades", OPTIONS, "** np.float32(power)", "** np.float32(1)", parity("separate")),
    Bug(
        "unmoved segments",
        SEGMENTS,
        "rng.randrange(config.t_sin_random_shift + 1) if draws else 0",
        "0",
        parity("separate"),
    ),
    Bug(
        "padding counts in the mean", SCRATCH, "else labels != padding_idx", "else labels >= 0", parity("cross_entropy")
    ),
    Bug(
        "the waveform without its mean",
        "models.htdemucs.model",
        "self._time_only(xt) * std_t + mean_t",
        "self._time_only(xt) * std_t",
        parity("htdemucs.model"),
    ),
    Bug(
        "embeddings that are not scaled",
        "models.causal_lm.model",
        "return x if self.config.embed_scale is None else x * self.config.embed_scale",
        "return x",
        parity("causal_lm.model"),
    ),
    Bug(
        "segments ignored",
        "models.bert",
        "self.token_type_embeddings(token_types)",
        "self.token_type_embeddings(token_types * 0)",
        parity("bert.model"),
    ),
    Bug(
        "distances of one side only",
        "models.t5",
        "bidirectional = not self.stack.config.causal",
        "bidirectional = False",
        parity("t5.model"),
    ),
    Bug(
        "one GELU of two, on a small model",
        "models.whisper",
        "self.conv2(gelu(self.conv1(mel)))",
        "self.conv2(self.conv1(mel))",
        parity("whisper.model"),
    ),
    Bug(
        "a layer that sees what follows",
        "models.guides.ferrotorch",
        "causal=config.causal)",
        "causal=False)",
        parity("ferrotorch.model"),
    ),
    Bug(
        "the memory on the wrong norm",
        "models.guides.scratch.blocks",
        "self.norm_3(x), memory",
        "self.norm_1(x), memory",
        parity("scratch.model"),
    ),
    Bug(
        "a sequence that sees what follows",
        "models.guides.llm_prep.model",
        "self.stack = Stack(config.layer(causal=True)",
        "self.stack = Stack(config.layer(causal=False)",
        parity("llm_prep.model"),
    ),
    Bug(
        "embeddings without their factor",
        "models.transformer",
        "table(x) * math.sqrt(config.embed_dim)",
        "table(x)",
        parity("transformer.model"),
    ),
    Bug(
        "the branch that is already changed",
        METALAUDIO,
        "self.cross_attn_freq(normed_freq, normed_time)",
        "self.cross_attn_freq(normed_freq, self.norm_time_cross(time))",
        parity("metalaudio.model"),
    ),
]
