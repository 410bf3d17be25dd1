"""Audio files that are written: their encoders, tags and names."""

from mutants.runner import Bug, tests

ENCODE, ENCODERS, OGG, FILES, TAGS = "audio.encode", "audio.encoders", "audio.ogg", "audio.files", "audio.tags"
STEMS, STEM_FILE = "separation.stems", "separation.stem_file"


def encode(name: str) -> tuple[str, ...]:
    return tests(f"tests/audio/test_encode.py::{name}")


def tagged(name: str) -> tuple[str, ...]:
    return tests(f"tests/audio/test_tags.py::{name}")


STEM = tests("tests/separation/test_stem_file.py")
NAMES = tests("tests/separation/test_stems.py::test_names_of_folders_and_tags")
PLACES, MP3 = encode("test_every_format_keeps_length_and_place"), encode("test_mp3_is_exact_at_every_bit_rate")

BUGS = [
    Bug("LAME's last frame forgotten", ENCODERS, 'if self._codec.name == "libmp3lame"', "if False", MP3),
    Bug(
        "delay counted twice", ENCODERS, "frames * frame - delay - samples", "frames * frame - 2 * delay - samples", MP3
    ),
    Bug(
        "check of another polynomial",
        ENCODERS,
        "0xA001",
        "0x8408",
        encode("test_the_check_of_the_mp3_tag"),
    ),
    Bug("lengths in milliseconds", ENCODERS, 'options["movie_timescale"] = str(sample_rate)', "pass", PLACES),
    Bug("frames begin at 0 again", ENCODERS, "self._done += tracks[0].shape[1]", "pass", PLACES),
    Bug("empty blocks are encoded", ENCODERS, "if not tracks[0].shape[1]:", "if False:", encode("test_empty_blocks")),
    Bug(
        "versions in the file",
        ENCODERS,
        "stream.codec_context.flags |= _CODEC_BITEXACT",
        "pass",
        encode("test_equal_audio_makes_equal_files"),
    ),
    Bug(
        "samples beyond full scale", ENCODERS, "np.clip(audio, -1, 1)", "audio", tests("tests/separation/test_stems.py")
    ),
    Bug(
        "cover among the comments forgotten",
        ENCODERS,
        "if tags.cover else {}",
        "if False else {}",
        tagged("test_tags_that_are_written"),
    ),
    Bug(
        "a page is not split", OGG, "flags & _LAST and not self._audio", "False", encode("test_short_and_silent_vorbis")
    ),
    Bug("a page split where it is one sample off", OGG, "// 4\n", "// 4 + 1\n", encode("test_short_and_silent_vorbis")),
    Bug("a check with zlib's complement", OGG, "0xFFFFFFFF) ^ 0xFFFFFFFF", "0)", encode("test_pages_of_vorbis")),
    Bug("pages are not numbered", OGG, "self._pages += 1", "pass", encode("test_pages_of_vorbis")),
    Bug("the time stays", ENCODE, 'if name == b"PEAK"', "if False", tagged("test_a_title_that_looks_like_a_chunk")),
    Bug(
        "names of tags in capitals",
        TAGS,
        "name.lower(): text",
        "name: text",
        tagged("test_tags_of_songs_that_ffmpeg_wrote"),
    ),
    Bug(
        "tags of Ogg are not looked for",
        TAGS,
        "*container.streams.audio[:1]",
        "",
        tagged("test_tags_of_songs_that_ffmpeg_wrote"),
    ),
    Bug(
        "control characters stay", TAGS, 'in ("Cc", "Cs", "Zl", "Zp")', 'in ("Cs",)', tagged("test_texts_are_one_line")
    ),
    Bug(
        "a chmod that fails",
        FILES,
        "with suppress(OSError):  # a file system without permissions",
        "if True:",
        tests("tests/audio/test_files.py"),
    ),
    Bug(
        "a leftover that is none",
        FILES,
        "if os.fstat(handle).st_nlink:",
        "if True:",
        tests("tests/audio/test_files.py"),
    ),
    Bug("a tag names a folder", STEMS, r"[/\\]|^\.", r"^\.", NAMES),
    Bug("a number without zeros", STEMS, "number.zfill(2)", "number", NAMES),
    Bug("the separator of an absent number", STEMS, r"(\. |[ _-])*", "", NAMES),
    Bug(
        "gains are not those of the stems",
        STEMS,
        "self._read_spool(stem, divisors[stem])",
        "self._read_spool(stem, np.float32(2))",
        STEM,
    ),
    Bug("any number of stems", STEM_FILE, "if len(stems) != _STEMS:", "if False:", STEM),
    Bug("user data is replaced", STEM_FILE, "held + _join_boxes", "_join_boxes", STEM),
    Bug("all tracks are enabled", ENCODERS, "if not stream.index:", "if True:", STEM),
    Bug("the mix is missing among the names", STEM_FILE, '("mix", *stems)', '(*stems, "mix")', STEM),
]
