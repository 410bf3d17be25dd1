"""Separation."""

from mutants.runner import Bug, tests

SEGMENTS = "separation.segments"
TRACKS = tests("tests/models/test_htdemucs_golden.py::test_track")

BUGS = [
    Bug(
        "zeros beside a short segment",
        SEGMENTS,
        "return track.levelled(start, start + target)",
        (
            "piece = track.levelled(offset, offset + length)\n"
            "    left = (target - length) // 2\n"
            "    return mx.pad(piece, [(0, 0), (left, target - length - left)])"
        ),
        TRACKS,
    ),
    Bug(
        "flat segments",
        SEGMENTS,
        "return (triangle / triangle.max()) ** np.float32(power)",
        "return triangle * 0 + 1",
        TRACKS,
    ),
    Bug("transition power ignored", SEGMENTS, "** np.float32(power)", "** np.float32(1)", TRACKS),
    Bug(
        "draws of the segments forgotten",
        SEGMENTS,
        "rng.randrange(config.t_sin_random_shift + 1) if draws else 0",
        "0",
        TRACKS,
    ),
    Bug(
        "weights of the bag ignored",
        SEGMENTS,
        "[weights[member][s] for s in wanted], np.float32)",
        "[1.0 for s in wanted], np.float32)",
        TRACKS,
    ),
]
