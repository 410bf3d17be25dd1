"""The command separate, its folders and the places of its stems."""

from mutants.runner import Bug, tests

SONGS, SEPARATE, TARGETS, FOLDERS = "cli.songs", "cli.separate", "separation.targets", "audio.folders"


def folders(name):
    return tests(f"tests/cli/test_separate_folders.py::{name}")


def listing(name):
    return tests(f"tests/audio/test_folders.py::{name}")


BUGS = [
    Bug(
        "links before real folders",
        FOLDERS,
        "(links if path.is_symlink() else waiting).append(path)",
        "waiting.append(path)",
        listing("test_links_are_followed_once"),
    ),
    Bug(
        "hidden files found",
        FOLDERS,
        'if not name.startswith(".")',
        "if name",
        listing("test_all_levels_in_order_without_hidden_ones"),
    ),
    Bug(
        "broken links passed over",
        FOLDERS,
        "(os.path.isfile(f) or not os.path.exists(f))",
        "os.path.isfile(f)",
        listing("test_a_link_that_leads_nowhere_is_not_passed_over"),
    ),
    Bug(
        "folders skipped by name",
        FOLDERS,
        "{_identify(path) for path in skip if path.exists()}",
        "set()",
        listing("test_folders_to_skip"),
    ),
    Bug(
        "an input overwritten",
        TARGETS,
        "identify(path) == own",
        "path == recording",
        folders("test_an_input_is_never_overwritten"),
    ),
    Bug(
        "another input overwritten",
        SONGS,
        "elif replaced:",
        "elif not replaced and False:",
        folders("test_no_stem_overwrites_another_input"),
    ),
    Bug(
        "a found song taken for a stem",
        SONGS,
        "if all(found) and",
        "if",
        folders("test_a_found_song_that_no_run_made_is_not_overwritten"),
    ),
    Bug("case of names", SONGS, ".casefold()", "", folders("test_two_songs_of_one_name")),
    Bug(
        "names of folders that are not told apart",
        SONGS,
        "if len({fold(path) for path in ends.values()}) == different:",
        "if True:",
        folders("test_names_of_folders"),
    ),
    Bug(
        "stems of another length skipped",
        TARGETS,
        "if measured or found is None",
        "if found is None",
        folders("test_skip_existing"),
    ),
    Bug(
        "stems of another song skipped",
        TARGETS,
        "<= _ROUNDING",
        ">= 0",
        folders("test_skip_existing_sees_other_rates_and_lengths"),
    ),
    Bug(
        "cut files skipped",
        "audio.inspection",
        "if _is_cut(file):",
        "if False:",
        tests("tests/audio/test_inspection.py::test_complete_and_cut_files"),
    ),
    Bug(
        "the rest at the model's rate",
        "separation.run",
        "count = 1 if subtracts else",
        "subtracts = False; count =",
        tests("tests/separation/test_two_stems.py::test_the_rest_at_the_songs_own_rate_adds_up_to_the_song"),
    ),
    Bug(
        "other stems that are not there",
        "separation.options",
        'self.other_method == "add" and len(sources) > 1',
        'self.other_method == "add"',
        tests("tests/separation/test_two_stems.py::test_two_stems_of_a_model_with_one_source"),
    ),
]
