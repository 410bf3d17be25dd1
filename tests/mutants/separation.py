"""Separation."""

from mutants.runner import Bug, tests

OPTIONS, SEGMENTS = "separation.options", "separation.segments"
TRACKS = tests("tests/models/test_htdemucs_golden.py::test_track")

BUGS = [
    Bug(
        "zeros beside a short segment",
        SEGMENTS,
        "return track.read_normalized(start, start + target)",
        (
            "piece = track.read_normalized(offset, offset + length)\n"
            "    left = (target - length) // 2\n"
            "    return mx.pad(piece, [(0, 0), (left, target - length - left)])"
        ),
        TRACKS,
    ),
    Bug(
        "flat segments",
        OPTIONS,
        "return (triangle / triangle.max()) ** np.float32(power)",
        "return triangle * 0 + 1",
        TRACKS,
    ),
    Bug("transition power ignored", OPTIONS, "** np.float32(power)", "** np.float32(1)", TRACKS),
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
