"""Files of every format, rate and number of channels, whole and damaged: what ffmpeg decodes is what we read.

Each file is made here by the ffmpeg program, and decoded by it again. Sources: `ffmpeg -i FILE`.
"""

import pytest
from support.ffmpeg import FLOATS, decode, differ, ffmpeg, read, song

STEREO, MONO, SURROUND = (2, 44100), (1, 22050), (6, 48000)
TABLE = [  # the file's name, its song, ffmpeg's arguments, the largest difference
    *((f"{codec}.wav", STEREO, ["-c:a", codec], 0) for codec in ("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le")),
    *((f"{codec}.wav", STEREO, ["-c:a", codec], 0) for codec in ("pcm_f32le", "pcm_f64le", "pcm_mulaw", "pcm_alaw")),
    *((f"{codec}.wav", MONO, ["-c:a", codec], 0) for codec in ("adpcm_ima_wav", "adpcm_ms")),
    ("surround.wav", SURROUND, ["-c:a", "pcm_s16le"], 0),
    ("large.wav", STEREO, ["-rf64", "always"], 0),
    ("mp3_inside.wav", STEREO, ["-c:a", "libmp3lame", "-b:a", "128k"], FLOATS),
    ("x.w64", STEREO, ["-c:a", "pcm_s24le"], 0),
    ("x.aiff", STEREO, ["-c:a", "pcm_s16be"], 0),
    ("deep.aiff", (1, 96000), ["-c:a", "pcm_s24be"], 0),
    ("x.caf", STEREO, ["-c:a", "pcm_s16le"], 0),
    ("alac.caf", STEREO, ["-c:a", "alac"], 0),
    ("x.au", STEREO, ["-c:a", "pcm_s16be"], 0),
    ("x.flac", STEREO, [], 0),
    ("deep.flac", (2, 96000), ["-sample_fmt", "s32"], 0),
    ("mono.flac", (1, 8000), [], 0),
    ("surround.flac", SURROUND, [], 0),
    ("cbr128.mp3", STEREO, ["-b:a", "128k"], FLOATS),
    ("cbr32.mp3", STEREO, ["-b:a", "32k"], FLOATS),
    ("mono.mp3", MONO, ["-b:a", "24k"], FLOATS),
    ("low.mp3", (1, 8000), ["-b:a", "8k"], FLOATS),
    ("vbr.mp3", STEREO, ["-q:a", "4"], FLOATS),
    ("vbr_without_header.mp3", STEREO, ["-q:a", "4", "-write_xing", "0", "-id3v2_version", "0"], FLOATS),
    ("tagged.mp3", STEREO, ["-b:a", "96k", "-metadata", "title=x", "-write_id3v1", "1"], FLOATS),
    ("x.mp2", STEREO, ["-b:a", "192k"], FLOATS),
    ("x.aac", STEREO, [], FLOATS),
    ("fast.m4a", (2, 48000), ["-c:a", "aac", "-movflags", "+faststart"], FLOATS),
    ("mono.m4a", MONO, ["-c:a", "aac"], FLOATS),
    ("surround.m4a", SURROUND, ["-c:a", "aac"], FLOATS),
    ("alac.m4a", STEREO, ["-c:a", "alac"], 0),
    ("pcm.mov", STEREO, ["-c:a", "pcm_s16le"], 0),
    ("x.3gp", STEREO, ["-c:a", "aac"], FLOATS),
    ("x.flv", STEREO, ["-c:a", "aac"], FLOATS),
    ("mp3.flv", STEREO, ["-c:a", "libmp3lame"], FLOATS),
    ("x.ts", STEREO, ["-c:a", "aac"], FLOATS),
    ("mp2.ts", STEREO, ["-c:a", "mp2"], FLOATS),
    ("x.mpg", STEREO, ["-c:a", "mp2", "-f", "mpeg"], FLOATS),
    ("x.avi", STEREO, ["-c:a", "libmp3lame"], FLOATS),
    ("flac.mkv", STEREO, ["-c:a", "flac"], 0),
    ("aac.mkv", STEREO, ["-c:a", "aac"], FLOATS),
    ("x.webm", (2, 48000), ["-c:a", "libopus"], FLOATS),
    ("x.ogg", STEREO, ["-c:a", "libvorbis"], FLOATS),
    ("mono.ogg", MONO, ["-c:a", "libvorbis"], FLOATS),
    ("surround.ogg", SURROUND, ["-c:a", "libvorbis"], FLOATS),
    ("flac.oga", STEREO, ["-c:a", "flac"], 0),
    ("x.opus", (2, 48000), ["-b:a", "96k"], FLOATS),
    ("mono.opus", (1, 48000), ["-b:a", "32k"], FLOATS),
    ("high.opus", (2, 48000), ["-b:a", "450k"], FLOATS),
    ("surround.opus", SURROUND, ["-b:a", "256k", "-mapping_family", "1"], FLOATS),
    ("three.opus", (3, 48000), ["-af", "channelmap=channel_layout=3.0", "-mapping_family", "1"], FLOATS),
    ("x.wma", STEREO, ["-c:a", "wmav2"], FLOATS),
    ("old.wma", STEREO, ["-c:a", "wmav1"], FLOATS),
    ("x.ac3", STEREO, [], FLOATS),
    ("surround.ac3", SURROUND, [], FLOATS),
    ("x.eac3", STEREO, [], FLOATS),
    ("x.dts", SURROUND, ["-c:a", "dca", "-strict", "-2", "-b:a", "768k"], FLOATS),
    ("x.tta", STEREO, [], 0),
    ("x.wv", STEREO, ["-c:a", "wavpack"], 0),
]


@pytest.mark.parametrize(("name", "kind", "arguments", "most"), TABLE, ids=[row[0] for row in TABLE])
def test_whole_files(tmp_path, name, kind, arguments, most):
    ffmpeg("-i", song(tmp_path, *kind), *arguments, tmp_path / name)
    theirs, their_rate = decode(tmp_path / name)
    ours, rate, warnings = read(tmp_path / name)
    assert (rate, warnings) == (their_rate, [])
    assert theirs.shape[1] > 1.9 * rate
    assert differ(ours, theirs) <= most
