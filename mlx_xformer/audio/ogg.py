"""Ogg Vorbis files with our tags: what libsndfile writes is changed on its way to the file.

libsndfile numbers each stream at random and cannot write a cover. Source: RFC 3533 (pages), the Vorbis I specification
(section 5, comments).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

from .sink import Sink

_HEADERS = 3  # packets before the audio: identification, comments, setup
_HEAD = struct.Struct("<4sBBqIIIB")  # "OggS", version, flags, position, stream, number, check, length of the table
_CONTINUED, _FIRST, _LAST = 1, 2, 4  # flags
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_STREAM = 1  # the number of the only stream


class VorbisSink:
    """A file object for libsndfile, which passes an Ogg Vorbis file on to another.

    Args:
        sink: where the file goes.
        comments: the names and texts of the tags.
    """

    def __init__(self, sink: Sink, comments: Mapping[str, str]) -> None:
        self._sink, self._comments = sink, comments
        self._held = bytearray()  # no whole page yet
        self._packets = [b""]  # of the headers; the last one is not whole yet
        self._size = self._pages = 0
        self._audio = False  # whether a page of audio was written

    def write(self, data: bytes) -> int:
        """Takes bytes, and passes on the pages that are whole."""
        self._held += bytes(data)
        self._size += len(data)
        while len(self._held) >= _HEAD.size:
            table = self._held[_HEAD.size : _HEAD.size + self._held[_HEAD.size - 1]]
            end = _HEAD.size + self._held[_HEAD.size - 1] + sum(table)
            if len(self._held) < end:
                break
            self._take_page(bytes(self._held[:end]), bytes(table))
            del self._held[:end]
        return len(data)

    def tell(self) -> int:
        """Returns how many bytes came."""
        return self._size

    def seek(self, offset: int, whence: int = 0) -> int:
        """Stays where it is: libsndfile asks only for the size of the empty file."""
        return self._size

    def read(self, size: int) -> bytes:
        """Returns nothing."""
        return b""

    def _take_page(self, page: bytes, table: bytes) -> None:
        """Passes on a page of audio, or collects the packets of the headers."""
        if len(self._packets) > _HEADERS:
            _, _, flags, position, *_ = _HEAD.unpack_from(page)
            self._put_audio(flags, position, table, page[_HEAD.size + len(table) :])
            return
        at = _HEAD.size + len(table)
        for size in table:
            self._packets[-1] += page[at : at + size]
            at += size
            if size < 255:
                self._packets.append(b"")
        if len(self._packets) > _HEADERS:  # audio begins on a page of its own
            identification, comments, setup, _ = self._packets
            self._put_packets(_FIRST, identification)
            self._put_packets(0, self._rewrite(comments), setup)

    def _rewrite(self, packet: bytes) -> bytes:
        """The packet of the comments with our own; the name of the encoding library stays."""
        end = 11 + struct.unpack_from("<I", packet, 7)[0]
        texts = [f"{name}={text}".encode() for name, text in self._comments.items()]
        packed = b"".join(struct.pack("<I", len(text)) + text for text in texts)
        return packet[:end] + struct.pack("<I", len(texts)) + packed + b"\1"

    def _put_packets(self, flags: int, *packets: bytes) -> None:
        """Writes whole packets of the headers in as many pages as they need."""
        table = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
        data, at = b"".join(packets), 0
        for start in range(0, len(table), 255):
            part = table[start : start + 255]
            position = 0 if min(part) < 255 else -1  # -1: no packet ends on this page
            self._put_page(flags, position, part, data[at : at + sum(part)])
            at += sum(part)
            flags = _CONTINUED if part[-1] == 255 else 0

    def _put_audio(self, flags: int, position: int, table: bytes, data: bytes) -> None:
        """Writes a page of audio. A single one is split: FFmpeg finds the first sample only if another page follows."""
        ends = [at + 1 for at, size in enumerate(table) if size < 255]  # of packets, in the table
        if flags & _LAST and not self._audio and len(ends) > 2:
            split = sum(table[: ends[1]])
            samples = sum(self._block_size(data[sum(table[:start]) :]) for start in (0, ends[0])) // 4
            if samples < position:
                self._put_page(0, samples, table[: ends[1]], data[:split])
                table, data = table[ends[1] :], data[split:]
        self._put_page(flags, position, table, data)
        self._audio = True

    def _block_size(self, packet: bytes) -> int:
        """The samples of a packet's window, of which libvorbis has two sizes. Two packets give a fourth of both."""
        sizes = self._packets[0][28]
        return 1 << (sizes >> 4 if packet[0] & 2 else sizes & 15)

    def _put_page(self, flags: int, position: int, table: bytes, data: bytes) -> None:
        rest = table + data
        head = (b"OggS", 0, flags, position, _STREAM, self._pages)
        check = _check(_HEAD.pack(*head, 0, len(table)) + rest)
        self._sink.write(_HEAD.pack(*head, check, len(table)) + rest)
        self._pages += 1


def _check(page: bytes) -> int:
    """Ogg's cyclic redundancy check: that of zlib with all bits in the opposite order, and without its complements."""
    value = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)
