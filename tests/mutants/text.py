"""Text."""

from mutants.runner import Bug, tests

SENTENCES = "text.sentences"
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

BUGS = [
    Bug("sentences in another order", SENTENCES, "mx.array(np.argsort(order))", "mx.array(np.array(order))", BY_BERT),
    Bug("sentences are cut at the positions", SENTENCES, "_read_max_length(folder) or ", "", BY_BERT),
    Bug("sentences are padded inside", SENTENCES, "< lengths[:, None]", "<= lengths[:, None]", BY_BERT),
    Bug("vectors are never normed", SENTENCES, 'return "Normalize" in names', "return False", BY_BERT),
    Bug("vectors are always normed", SENTENCES, 'return "Normalize" in names', "return True", BY_BERT),
]
