"""Protocol buffers by the million: fields as columns of bytes, with a mask of those that a row has.

Source: the wire format as its documentation states it (protobuf.dev, "Encoding").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Wire types.
_VARINT, _FIXED64, _BYTES = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """N rows of bytes, each of its own length.

    cells  uint8[N, W]
    there  bool[N, W] which cells a row has
    """

    cells: np.ndarray
    there: np.ndarray

    def lengths(self) -> np.ndarray:
        """int64[N]"""
        found: np.ndarray = self.there.sum(axis=1)
        return found

    def where(self, some: np.ndarray) -> Rows:
        """Nothing in the other rows. some: bool[N]"""
        return Rows(self.cells, self.there & some[:, None])

    def flat(self) -> np.ndarray:
        """uint8[bytes] row after row."""
        found: np.ndarray = self.cells[self.there]
        return found


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows side by side."""
    return Rows(
        np.concatenate([part.cells for part in parts], axis=1),
        np.concatenate([part.there for part in parts], axis=1),
    )


def fixed(content: bytes, rows: int) -> Rows:
    """The same bytes in every row."""
    cells = np.broadcast_to(np.frombuffer(content, dtype=np.uint8), (rows, len(content)))
    return Rows(cells, np.ones((rows, len(content)), dtype=bool))


def varints(values: np.ndarray) -> Rows:
    """Numbers in as few bytes as each needs. values: int[N], none negative"""
    whole = values.astype(np.uint64)
    most = int(whole.max(initial=0))
    width = max((most.bit_length() + 6) // 7, 1)
    # Narrow numbers are shifted in narrow words, which takes a fraction of the time.
    word: type[np.unsignedinteger] = np.uint32 if width <= 4 else np.uint64
    rest = whole.astype(word)[:, None] >> np.arange(0, 7 * width, 7).astype(word)
    there = rest > 0
    there[:, 0] = True
    cells = (rest & word(0x7F)).astype(np.uint8)
    cells[:, :-1] |= there[:, 1:].view(np.uint8) << np.uint8(7)
    return Rows(cells, there)


def doubles(values: np.ndarray) -> Rows:
    """float64[N], or uint64[N], in eight bytes each, the lowest first."""
    cells = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).view(np.uint8)
    return Rows(cells.reshape(len(values), 8), np.ones((len(values), 8), dtype=bool))


def key(number: int, wire: int) -> bytes:
    """What stands before the value of a field."""
    return varint(number << 3 | wire)


def varint(value: int) -> bytes:
    """One number in as few bytes as it needs."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def number_field(number: int, value: int) -> bytes:
    """A field with a whole number."""
    return key(number, _VARINT) + varint(value)


def bytes_field(number: int, content: bytes | str) -> bytes:
    """A field with text or a message."""
    held = content.encode() if isinstance(content, str) else content
    return key(number, _BYTES) + varint(len(held)) + held


def number_column(number: int, values: np.ndarray) -> Rows:
    """A field with a whole number in every row."""
    return joined([fixed(key(number, _VARINT), len(values)), varints(values)])


def double_column(number: int, values: np.ndarray) -> Rows:
    """A field with eight bytes in every row: float64[N] or uint64[N]."""
    return joined([fixed(key(number, _FIXED64), len(values)), doubles(values)])


def message_column(number: int, content: Rows, more: np.ndarray | int = 0) -> Rows:
    """A message in every row.

    more   int[N] bytes of it that will stand behind its row
    """
    size = content.lengths() + more
    return joined([fixed(key(number, _BYTES), len(size)), varints(size), content])


def interleaved(parts: Sequence[np.ndarray], lengths: Sequence[np.ndarray]) -> np.ndarray:
    """Row after row, of each the parts in their order.

    parts    uint8[bytes] each part of all rows
    lengths  int64[N] of each part
    Returns  uint8[all bytes]
    """
    sizes = np.stack(lengths, axis=1).ravel()
    belongs = np.repeat(np.tile(np.arange(len(parts), dtype=np.uint8), len(lengths[0])), sizes)
    found = np.empty(len(belongs), dtype=np.uint8)
    for number, part in enumerate(parts):
        found[belongs == number] = part
    return found
