"""The reading of recordings: which library reads them, damage, parts, and surround."""

from mutants.runner import Bug, tests

CONTAINERS, FRAMES, PCM, SOURCE = "audio.containers", "audio.frames", "audio.pcm", "audio.source"
RECORDING, RESAMPLING = "audio.recording", "audio.resampling"


def damage(name: str) -> tuple[str, ...]:
    return tests(f"tests/audio/test_damage.py::{name}")


def reading(name: str) -> tuple[str, ...]:
    return tests(f"tests/audio/test_reading.py::{name}")


CHANGE, SHORT = damage("test_files_that_change_on_their_way"), damage("test_a_download_cut_short")
PACKET, SURROUND = damage("test_one_damaged_packet"), damage("test_surround_becomes_stereo_with_its_centre")
STOPPED, FEW = damage("test_wav_of_a_recorder_that_stopped"), damage("test_flac_that_counts_too_few_samples")
FORMATS = tests("tests/audio/test_formats.py")

BUGS = [
    Bug("the resampler stays", CONTAINERS, "if now != last:", "if False:", CHANGE),
    Bug(
        "only the first part of a chain",
        CONTAINERS,
        "in _find_parts(source):",
        "in _find_parts(source)[:1]:",
        damage("test_chained_ogg"),
    ),
    Bug(
        "a wrong bit refuses the file",
        CONTAINERS,
        "if not seconds:",
        "if True:",
        damage("test_a_part_of_a_chained_ogg_that_cannot_be_read"),
    ),
    Bug("no word of an early end", CONTAINERS, "loss.seconds < promised - LATE", "loss.seconds < 0", SHORT),
    Bug("a Xing tag of 576 samples", CONTAINERS, "(1152 if", "(576 if", SHORT),
    Bug("AC-3's levels swapped", FRAMES, "return centre, surround", "return surround, centre", SURROUND),
    Bug("damage is not counted", FRAMES, 'loss.add("damaged packet"', 'str("damaged packet"', PACKET),
    Bug("gaps are not counted", FRAMES, "if gap > _GAP", "if gap > 1e9", PACKET),
    Bug(
        "padding stays",
        FRAMES,
        "_trim(held, before) if trims",
        "held if trims",
        damage("test_the_padding_of_an_m4a_is_cut"),
    ),
    Bug(
        "what the decoder holds is lost",
        FRAMES,
        "            yield from frames\n            return",
        "            return",
        FORMATS,
    ),
    Bug("integers one bit too loud", FRAMES, "2.0 ** (1 - 8", "2.0 ** (2 - 8", FORMATS),
    Bug("unsigned samples off the middle", FRAMES, "- 128) / 128", "- 127) / 128", reading("test_unsigned_samples")),
    Bug("a size of 0 is believed", PCM, "_UNKNOWN_SIZE = (0, ", "_UNKNOWN_SIZE = (1, ", STOPPED),
    Bug("order of bytes ignored", PCM, '"LITTLE" if endian == "<" else "BIG"', '"LITTLE"', STOPPED),
    Bug(
        "no word of a wrong promise",
        PCM,
        "elif told > there + 1:",
        "elif False:",
        damage("test_wav_that_promises_more"),
    ),
    Bug("FLAC's count believed", RECORDING, "counted > found.samples", "counted < 0", FEW),
    Bug(
        "where libsndfile fails, the end",
        RECORDING,
        "if done == found.samples:",
        "if True:",
        damage("test_one_wrong_byte_in_flac"),
    ),
    Bug(
        "read on from the start",
        RECORDING,
        "block[:, max(done - at, 0) :]",
        "block",
        damage("test_one_wrong_byte_in_flac"),
    ),
    Bug(
        "a part begins late",
        RECORDING,
        "max(first - at, 0) :",
        "max(first - at, 1) :",
        reading("test_a_part_of_a_recording"),
    ),
    Bug("strict is lenient", RECORDING, "        if strict:\n", "        if False:\n", PACKET),
    Bug(
        "DTS in a WAV file as noise",
        RECORDING,
        'not header.codec.startswith("pcm_")',
        "False",
        reading("test_dts_in_a_wav_file"),
    ),
    Bug("the centre is dropped", RESAMPLING, "if downmix is not None and", "if False and", SURROUND),
    Bug(
        "readers share a position",
        SOURCE,
        "self._start + self._at, count",
        "self._start, count",
        reading("test_standard_input"),
    ),
]
