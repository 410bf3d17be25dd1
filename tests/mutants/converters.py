"""Conversions."""

from mutants.runner import Bug, tests

BERT = "converters.families.bert"
T5 = "converters.families.t5"
HTDEMUCS = "converters.families.htdemucs"
MOE = "converters.families.causal_lm_moe"
STREAMING = "converters.streaming"
CAUSAL_LM = "converters.families.causal_lm"
BY_BERT = tests(
    "tests/models/test_bert.py::test_forward_and_gradient",
    "tests/models/test_bert.py::test_padding_changes_nothing",
    "tests/models/test_bert.py::test_sides_segments_and_places_count",
    "tests/models/test_bert.py::test_pooling",
    "tests/models/test_bert.py::test_inputs_that_are_refused",
    "tests/models/test_bert.py::test_each_tensor_has_its_place",
    "tests/models/test_bert.py::test_sentences",
    "tests/models/test_bert.py::test_vectors_that_are_not_normed",
)
BY_T5 = tests(
    "tests/models/test_t5.py::test_forward_and_gradient",
    "tests/models/test_t5.py::test_cached_equals_uncached",
    "tests/models/test_t5.py::test_look_ahead",
    "tests/models/test_t5.py::test_padding_of_the_text_changes_nothing",
    "tests/models/test_t5.py::test_dropout",
    "tests/models/test_t5.py::test_each_tensor_has_its_place",
    "tests/models/test_t5.py::test_there_and_back",
)
FILES = "tests/converters/test_htdemucs_files.py::"
FORMATS = "converters.formats."
FUSED_EXPERTS_MIXTRAL = tests("tests/converters/test_causal_lm_moe.py::test_fused_experts[mixtral]")
ABSENT_KEYS_MIXTRAL = tests("tests/converters/test_causal_lm.py::test_absent_keys[mixtral]")

BUGS = [
    Bug("keys and values of BERT", BERT, '("key", "k"), ("value", "v")', '("key", "v"), ("value", "k")', BY_BERT),
    Bug(
        "norms of BERT",
        BERT,
        '_norm(names, layer + "attention.output.LayerNorm", ours + "norm1"),\n',
        '_norm(names, layer + "attention.output.LayerNorm", ours + "norm3"),\n',
        BY_BERT,
    ),
    Bug("gates of T5", T5, '"wi_0": "gate_proj", "wi_1": "up_proj"', '"wi_0": "up_proj", "wi_1": "gate_proj"', BY_T5),
    Bug("keys of T5", T5, '("k", "k_proj"), ("v", "v_proj")', '("k", "v_proj"), ("v", "k_proj")', BY_T5),
    Bug(
        "sides of T5",
        T5,
        'Rule(_RELATIVE.format(side=side), side + ".relative.weight")',
        'Rule(_RELATIVE.format(side="decoder" if side == "encoder" else "encoder"), side + ".relative.weight")',
        BY_T5,
    ),
    Bug("exact GELU in T5 1.1", T5, '"gelu_new" if word == "gelu" else word', "word", BY_T5),
    Bug(
        "transposed 3x3 kernel",
        HTDEMUCS,
        "_OVER_BOTH = (Permute((0, 3, 2, 1)),)",
        "_OVER_BOTH = (Permute((0, 2, 3, 1)),)",
        tests(
            "tests/models/test_htdemucs_golden.py::test_model[base]",
            "tests/models/test_htdemucs_golden.py::test_model[small0]",
            "tests/models/test_htdemucs_golden.py::test_model[merged]",
        ),
    ),
    Bug(
        "w1 and w3 change places",
        MOE,
        '"gate_proj": "w1", "up_proj": "w3"',
        '"gate_proj": "w3", "up_proj": "w1"',
        tests("tests/converters/test_causal_lm_moe.py::test_quantization[4-mixtral]"),
    ),
    Bug(
        "halves change places",
        MOE,
        'for part in ("gate_proj", "up_proj"))',
        'for part in ("up_proj", "gate_proj"))',
        tests("tests/converters/test_causal_lm_moe.py::test_fused_experts[olmoe]"),
    ),
    Bug(
        "packed routers go unseen",
        MOE,
        'f"{prefix}{theirs}.scales" in names',
        "False",
        tests("tests/converters/test_causal_lm_moe.py::test_packed_by_mlx_lm[as the others-qwen2 moe]"),
    ),
    Bug(
        "every other step",
        MOE,
        "(n + 1) % every",
        "n % every",
        tests("tests/converters/test_causal_lm_moe.py::test_keys_of_mixtures[qwen3_moe]"),
    ),
    Bug("weights as they are", MOE, 'values.get("norm_topk_prob", True)', "False", ABSENT_KEYS_MIXTRAL),
    Bug("fused experts lead back one by one", CAUSAL_LM, 'record.get("fused") is True', "False", FUSED_EXPERTS_MIXTRAL),
    Bug(
        "all of a join is its first",
        STREAMING,
        "zip(move.targets, move(arrays), strict=True)",
        "zip(move.targets, move(arrays)[:1] * len(move.targets), strict=True)",
        FUSED_EXPERTS_MIXTRAL,
    ),
    Bug(
        "windows below the last layers",
        CAUSAL_LM,
        "FULL if index % 2 or index >= first",
        "FULL if index % 2 or index < first",
        tests("tests/converters/test_causal_lm_moe.py::test_keys_of_mixtures[qwen2_moe]"),
    ),
    Bug(
        "a base that is another's",
        "converters.families.causal_lm_keys",
        '"rope_theta": 1e6, "sliding_window": None, **causal_lm_moe',
        '"sliding_window": None, **causal_lm_moe',
        ABSENT_KEYS_MIXTRAL,
    ),
    Bug(
        "the last state of a training run",
        FORMATS + "torch_contents",
        "        return _BEST\n",
        '        return "state"\n',
        tests(FILES + "test_the_best_state_of_a_training_run"),
    ),
    Bug(
        "objects of known calls",
        FORMATS + "torch_pickle",
        " or made.name in CALLS",
        "",
        tests("tests/converters/test_formats.py::test_hostile_training_arguments_run_nothing"),
    ),
    Bug(
        "numbers of NumPy backwards",
        FORMATS + "torch_values",
        'f"<{code}"',
        'f">{code}"',
        tests(FILES + "test_arguments_of_the_model_in_other_forms[2]"),
    ),
    Bug(
        "storages with their lengths",
        FORMATS + "torch_legacy",
        "places[storage.key] = position + 8",
        "places[storage.key] = position",
        tests(FILES + "test_the_older_format"),
    ),
    Bug(
        "1e-3 is a text",
        FORMATS + "training_config",
        "[eE][-+]?[0-9]+$",
        "[eE][+]?[0-9]+$",
        tests(FILES + "test_state_dicts_and_their_wrappers[state.th]"),
    ),
    Bug(
        "the first of several configurations",
        FORMATS + "training_config",
        "if len(found) > 1:",
        "if False:",
        tests(FILES + "test_where_the_configuration_is_found"),
    ),
    Bug(
        "a segment of a quarter",
        FORMATS + "training_config",
        '4 * dataset["segment"]',
        'dataset["segment"]',
        tests(FILES + "test_the_arguments_of_a_training_run"),
    ),
    Bug(
        "any option may be dropped",
        "converters.families.htdemucs_source",
        "if x is None or name in _NEUTRAL}",
        "}",
        tests(FILES + "test_options_that_htdemucs_does_not_have"),
    ),
    Bug(
        "heads are guessed",
        "converters.families.htdemucs_source",
        '["t_heads"] if options["t_layers"] else []',
        "[]",
        tests(FILES + "test_what_is_missing_is_named"),
    ),
    Bug(
        "doubles are rounded in silence",
        "converters.precision",
        "if doubles else []",
        "if not doubles else []",
        tests(FILES + "test_float64_is_rounded_and_said"),
    ),
    Bug(
        "strides of a package",
        FORMATS + "torch_package",
        "strides.append(strides[-1] * size)",
        "strides.append(size)",
        tests(FILES + "test_a_package_for_demucs"),
    ),
    Bug(
        "digits of another file",
        FORMATS + "torch_package",
        "hash_file(path)[:_DIGITS]",
        "hash_file(path)[-_DIGITS:]",
        tests(FILES + "test_a_package_for_demucs"),
    ),
]
