"""What a picture shows: its pixels, for tests that look at screenshots."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def pixels(png: bytes) -> np.ndarray:
    """uint8[rows, columns, 3] of a PNG of 8 bits a colour, without interlacing; what is see-through counts
    as it is."""
    at, data, width, height, channels = 8, b"", 0, 0, 3
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert depth == 8 and colour in (2, 6), (depth, colour)
            channels = 3 if colour == 2 else 4
        elif kind == b"IDAT":
            data += body
        at += size + 12
    lines = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * channels)
    rows = np.zeros((height + 1, width + 1, channels), np.uint8)
    for n, line in enumerate(lines):
        _unfilter(int(line[0]), line[1:].reshape(width, channels), rows[n], rows[n + 1])
    return rows[1:, 1:, :3]


def _unfilter(how: int, line: np.ndarray, above: np.ndarray, row: np.ndarray) -> None:
    """One line by its filter, into `row`; Source  PNG specification, section 9."""
    if how == 0:
        row[1:] = line
    elif how == 1:
        row[1:] = np.cumsum(line, axis=0, dtype=np.uint8)
    elif how == 2:
        row[1:] = line + above[1:]
    else:
        for x in range(1, len(row)):
            a, b, c = (side.astype(int) for side in (row[x - 1], above[x], above[x - 1]))
            row[x] = (line[x - 1] + ((a + b) // 2 if how == 3 else _paeth(a, b, c))) % 256


def _paeth(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    far = np.abs(np.stack([b - c, a - c, a + b - 2 * c]))
    found: np.ndarray = np.choose(far.argmin(axis=0), np.stack([a, b, c]))
    return found


def share_near(picture: np.ndarray, colour: str, far: int = 24) -> float:
    """The share of pixels within some steps of a colour such as "#0072b2" in each of red, green and blue."""
    wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    near: np.ndarray = (np.abs(picture.astype(int) - wanted) <= far).all(axis=2)
    return float(near.mean())
