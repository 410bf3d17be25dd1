"""Audio compressed in memory: Opus in a WebM container, which every current browser decodes."""

from __future__ import annotations

import io

import numpy as np

OPUS_RATE = 48000  # Hz: Opus has no other sample rate for music
_FASTEST = {
    "compression_level": "0",
    "application": "lowdelay",
    "frame_duration": "60",
}  # lowdelay: no codec for speech


def encode_webm(audio: np.ndarray, bitrate: int) -> bytes:
    """Encodes audio as Opus in a WebM container, in the encoder's fastest mode.

    Args:
        audio: (C, N) floats at OPUS_RATE, C being 1 or 2.
        bitrate: in kbit/s, on average; quiet passages take less.

    Returns:
        The bytes of a WebM file. Its header tells a decoder how many samples to leave out at both ends, so that N
        samples remain. Equal audio gives equal bytes.
    """
    import av

    layout = {1: "mono", 2: "stereo"}[audio.shape[0]]
    interleaved = np.ascontiguousarray(audio.T, np.float32).reshape(1, -1)
    out = io.BytesIO()
    with av.open(out, "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libopus", rate=OPUS_RATE, layout=layout, options=_FASTEST)
        stream.bit_rate = 1000 * bitrate
        frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
        frame.sample_rate = OPUS_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()
