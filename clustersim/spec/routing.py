"""Measured routing: tokens per expert, or the experts of single tokens, from the files that tools write.

Recognised by what is in them:
- CSV with layer,expert,count or layer_id,expert_id,count (SGLang's expert distribution recorder), and, if
  there are several, columns model, dataset and topk that tell one measurement from another;
- npz or npy with an array [tokens, layers, top_k] of expert ids (vLLM's routed experts), or with counts
  [layers, experts];
- JSON lines with `tokens_per_expert` (Megatron-Core): one list, with a `layer`, or one per layer.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from clustersim.errors import nearest
from clustersim.spec.documents import NO_FILE, DocumentError

#: Largest file that is read, and largest array in one, bytes.
LARGEST_FILE = 128 * 2**20
LARGEST_ARRAY = 512 * 2**20
#: Layers and experts beyond what can be meant.
MOST_LAYERS, MOST_EXPERTS = 10_000, 65_536
#: Layers times experts, which a fit holds several times over.
MOST_CELLS = 2**22
#: Measurements of one file.
MOST_MEASUREMENTS = 1000
#: Tokens of an expert beyond what can be meant; so many of MOST_EXPERTS still have a sum.
MOST_COUNT = 2**46
#: Longest packed text that a scenario may carry, characters.
LONGEST = 8 * 2**20
#: Names of measurements that a message lists.
_LISTED = 40


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """One measurement.

    name    model and data set, as far as the file says
    top_k   experts of a token; 0 where the file does not say
    layers  numbers of the layers, ascending
    counts  int64[L, E] tokens per expert
    ids     int[T, L, top_k] experts of each token, or None where only counts are known
    again   times that the file names an expert of a layer once more; its counts are added up
    """

    name: str
    top_k: int
    layers: tuple[int, ...]
    counts: np.ndarray
    ids: np.ndarray | None = None
    again: int = 0

    def nearest(self, layer: int) -> int:
        """The position of the layer that is nearest in number."""
        return min(range(len(self.layers)), key=lambda at: abs(self.layers[at] - layer))


class NoSuchMeasurement(DocumentError):
    """None, or several, of a file's measurements are called as wished."""


def choose(found: Sequence[Routing], name: str) -> Routing:
    """The measurement of that name, or the only one whose name holds all its words.

    name     "" where there is only one
    Raises   NoSuchMeasurement that lists the names
    """
    words = name.casefold().split()
    fitting = [one for one in found if all(word in one.name.casefold() for word in words)]
    exact = [one for one in fitting if one.name.casefold().split() == words]
    if len(exact or fitting) == 1:
        return (exact or fitting)[0]
    if not name:
        raise NoSuchMeasurement(
            f"holds {len(found)} measurements; gating.measurement names one of {listed(found)}"
        )
    if fitting:
        raise NoSuchMeasurement(f'holds {len(fitting)} measurements "{name}": {listed(fitting)}')
    near = nearest(name, [one.name for one in found])
    raise NoSuchMeasurement(f'holds no measurement "{name}"{near}; there are {listed(found)}')


def listed(found: Sequence[Routing]) -> str:
    """Their names, as many as a message should hold."""
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(f'"{_plain(one.name)}"' for one in found[:_LISTED]) + more


def _plain(text: str) -> str:
    """What stands in a file, safe to print and not endless."""
    return "".join(char if char.isprintable() else "?" for char in text[:80])


def read_routing(path: Path) -> list[Routing]:
    """All measurements of a file.

    Raises   DocumentError when it cannot be read or is none of the forms above
    """
    try:
        if not path.is_file():
            raise DocumentError(NO_FILE if not path.exists() else "is not a file")
        if path.stat().st_size > LARGEST_FILE:
            raise DocumentError(f"is larger than {LARGEST_FILE // 2**20} MiB")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if data[:2] == b"PK" or data[:6] == b"\x93NUMPY":
        return [_of_array(_array(data), path.stem, 0)]
    if not data.strip():
        raise DocumentError(f"is empty; wanted are {_WANTED}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DocumentError("is neither text nor npz nor npy") from None
    if text.lstrip()[:1] in ("{", "["):
        return [_of_json(text, path.stem)]
    return _of_csv(text, path.stem)


_WANTED = "layer,expert,count or layer_id,expert_id,count"


# --- arrays ---------------------------------------------------------------------------------------


def _array(data: bytes) -> np.ndarray:
    """The one array that says who goes where: ids before counts. Nothing is unpickled."""
    if data[:2] != b"PK":
        return _loaded(io.BytesIO(data))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            if sum(info.file_size for info in names) > LARGEST_ARRAY:
                raise DocumentError(f"holds more than {LARGEST_ARRAY // 2**20} MiB")
            arrays = [_loaded(io.BytesIO(archive.read(info))) for info in names]
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError) as error:
        raise DocumentError(f"is no readable npz: {error}") from None
    found = [a for wished in (3, 2) for a in arrays if a.ndim == wished]
    if not found:
        raise DocumentError(
            "has no array [tokens, layers, top_k] of expert ids, nor [layers, experts] of counts"
        )
    return found[0]


def _loaded(file: io.BytesIO) -> np.ndarray:
    try:
        major, _ = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        if dtype.hasobject:
            raise DocumentError("holds Python objects; numbers are wanted")
        if np.prod([float(n) for n in shape]) * dtype.itemsize > LARGEST_ARRAY:
            raise DocumentError(f"holds more than {LARGEST_ARRAY // 2**20} MiB")
        file.seek(0)
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except (ValueError, EOFError, SyntaxError) as error:
        raise DocumentError(f"is no readable array: {error}") from None


def _of_array(array: np.ndarray, name: str, top_k: int) -> Routing:
    if array.dtype.kind not in "iuf" or array.ndim not in (2, 3) or not array.size:
        raise DocumentError(
            f"holds {array.dtype} {list(array.shape)}; wanted are expert ids [tokens, layers, top_k] or "
            "counts [layers, experts]"
        )
    most, what = (MOST_EXPERTS - 1, "experts") if array.ndim == 3 else (MOST_COUNT, "counts of tokens")
    if not (array.min() >= 0 and array.max() <= most and _all_whole(array)):
        wrong = ~((array >= 0) & (array <= most) & (array == np.floor(array)))
        at = tuple(int(n) for n in np.unravel_index(int(wrong.argmax()), array.shape))
        raise DocumentError(f"holds {array[at]} at {list(at)}; {what} are whole numbers within 0 to {most}")
    layers = array.shape[1] if array.ndim == 3 else array.shape[0]
    if layers > MOST_LAYERS:
        raise DocumentError(f"has {layers} layers; at most {MOST_LAYERS} can be meant")
    if array.ndim == 2:
        return _checked(Routing(name, top_k, tuple(range(layers)), array.astype(np.int64)))
    ids = array.astype(np.uint16)
    ordered = np.sort(ids, axis=2)
    twice = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=(1, 2))
    if twice.any():
        raise DocumentError(f"token {int(twice.argmax())} names an expert twice in a layer")
    experts = int(ids.max()) + 1
    _check_size(layers, experts)
    counts = np.stack([np.bincount(ids[:, at].ravel(), minlength=experts) for at in range(layers)])
    return _checked(Routing(name, ids.shape[2], tuple(range(layers)), counts, ids))


def _all_whole(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or bool((array == np.floor(array)).all())


def _check_size(layers: int, experts: int) -> None:
    if experts > MOST_EXPERTS:
        raise DocumentError(f"has {experts} experts; at most {MOST_EXPERTS} can be meant")
    if layers * experts > MOST_CELLS:
        raise DocumentError(f"has {layers} layers of {experts} experts; at most {MOST_CELLS} in all are read")


def _checked(routing: Routing) -> Routing:
    _check_size(*routing.counts.shape)
    empty = np.flatnonzero(routing.counts.sum(axis=1) == 0)
    if len(empty):
        raise DocumentError(f"layer {routing.layers[empty[0]]} has no tokens")
    return routing


# --- text -----------------------------------------------------------------------------------------

_LAYER, _EXPERT, _COUNT = ("layer", "layer_id"), ("expert", "expert_id"), ("count", "tokens")
_TOP_K = ("topk", "top_k")
_GROUP = ("model", "dataset", *_TOP_K)


@dataclass(slots=True)
class _Rows:
    """What the rows of one measurement say."""

    counts: dict[tuple[int, int], int] = field(default_factory=dict)
    experts: int = 0
    again: int = 0

    def add(self, place: tuple[int, int], count: int, line: int) -> None:
        """One more row. A recorder that writes pass after pass names an expert again and again."""
        self.again += place in self.counts
        self.counts[place] = self.counts.get(place, 0) + count
        if len(self.counts) > MOST_CELLS:
            raise DocumentError(f"has more than {MOST_CELLS} experts of layers", line)
        if self.counts[place] > MOST_COUNT:
            layer, expert = place
            raise DocumentError(
                f"with this row expert {expert} of layer {layer} has more than {MOST_COUNT} tokens", line
            )


def _of_csv(text: str, stem: str) -> list[Routing]:
    rows = csv.DictReader(io.StringIO(text))
    try:
        return _of_rows(rows, stem)
    except csv.Error as error:
        raise DocumentError(f"is no readable CSV: {error}", rows.reader.line_num) from None


def _of_rows(rows: csv.DictReader[str], stem: str) -> list[Routing]:
    columns = rows.fieldnames or []
    layer, expert, count = (
        next((c for c in names if c in columns), None) for names in (_LAYER, _EXPERT, _COUNT)
    )
    if layer is None or expert is None or count is None:
        said = ", ".join(_plain(str(c)) for c in columns[:6])
        raise DocumentError(f"has columns {said}; wanted are {_WANTED}", 1)
    grouped = [c for c in _GROUP if c in columns]
    found: dict[tuple[str, ...], _Rows] = {}
    for row in rows:
        line = rows.line_num
        if None in row:
            raise DocumentError(f"has more cells than the {len(columns)} of the header", line)
        for column in _TOP_K:
            if row.get(column):
                _whole(row, column, line, MOST_EXPERTS, 1)
        of = found.setdefault(tuple((row[c] or "").strip() for c in grouped), _Rows())
        if len(found) > MOST_MEASUREMENTS:
            raise DocumentError(
                f"begins one measurement more than the {MOST_MEASUREMENTS} that are read", line
            )
        place = (_whole(row, layer, line, MOST_LAYERS), _whole(row, expert, line, MOST_EXPERTS - 1))
        if row.get("num_experts"):
            of.experts = max(of.experts, _whole(row, "num_experts", line, MOST_EXPERTS, 1))
            if place[1] >= of.experts:
                raise DocumentError(f"{expert} {place[1]} is not one of num_experts = {of.experts}", line)
        of.add(place, _whole(row, count, line, MOST_COUNT), line)
    if not found:
        raise DocumentError("has no rows below its header")
    return [_of_counts(of, key, grouped, stem) for key, of in found.items()]


def _whole(row: dict[str, Any], column: str, line: int, most: int, least: int = 0) -> int:
    text = (row[column] or "").strip()
    try:
        number = int(text)
    except ValueError:
        raise DocumentError(f'{column} "{_plain(text)[:40]}" is not a whole number', line) from None
    if not least <= number <= most:
        raise DocumentError(f"{column} {number} is not within {least} to {most}", line)
    return number


def _of_counts(of: _Rows, key: tuple[str, ...], grouped: list[str], stem: str) -> Routing:
    layers = sorted({layer for layer, _ in of.counts})
    experts = max(of.experts, 1 + max(expert for _, expert in of.counts))
    _check_size(len(layers), experts)
    table = np.zeros((len(layers), experts), dtype=np.int64)
    position = {layer: at for at, layer in enumerate(layers)}
    for (layer, expert), count in of.counts.items():
        table[position[layer], expert] = count
    said = dict(zip(grouped, key, strict=True))
    stated = [text for column in _TOP_K if (text := said.pop(column, ""))]
    name = " ".join(part for part in (*said.values(), *(f"top-{int(k)}" for k in stated)) if part) or stem
    return _checked(Routing(name, int(stated[0]) if stated else 0, tuple(layers), table, again=of.again))


def _of_json(text: str, stem: str) -> Routing:
    sums: dict[int, np.ndarray] = {}
    again = 0
    for where, line, record in _records(text):
        if not isinstance(record, dict) or "tokens_per_expert" not in record:
            raise DocumentError(f'{where}has no "tokens_per_expert": a list of counts', line)
        try:
            for layer, counts in _by_layer(record):
                before = sums.get(layer)
                if before is not None and len(before) != len(counts):
                    raise ValueError(f"layer {layer} has {len(counts)} experts, and {len(before)} before")
                if before is None:
                    _check_size(len(sums) + 1, len(counts))
                again += before is not None
                sums[layer] = counts if before is None else before + counts
                if sums[layer].max() > MOST_COUNT:
                    raise ValueError(f"an expert of layer {layer} has more than {MOST_COUNT} tokens in all")
        except ValueError as error:
            raise DocumentError(f"{where}{error}", line) from None
    if not sums:
        raise DocumentError("has no records")
    if len({len(counts) for counts in sums.values()}) > 1:
        raise DocumentError("has layers with different numbers of experts")
    layers = tuple(sorted(sums))
    return _checked(Routing(stem, 0, layers, np.stack([sums[layer] for layer in layers]), again=again))


def _records(text: str) -> Iterator[tuple[str, int | None, Any]]:
    """Where each record stands, as words or as a line, and the record."""
    lines = text.splitlines()
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield "", number, json.loads(line)
        return
    except (ValueError, RecursionError) as error:
        if number > 1 and lines[0].strip() not in ("[", "{"):
            why = f": {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
            raise DocumentError(f"is not JSON{why}", number) from None
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise DocumentError(f"is neither JSON lines nor JSON: {error.msg}", error.lineno) from None
    except (ValueError, RecursionError):
        raise DocumentError("is neither JSON lines nor JSON") from None
    several = isinstance(whole, list)
    for number, record in enumerate(whole if several else [whole], 1):
        yield f"record {number}: " if several else "", None, record


def _by_layer(record: dict[str, Any]) -> Iterator[tuple[int, np.ndarray]]:
    """Raises ValueError that says what is wrong."""
    said = next((record[c] for c in ("layer", "layer_id", "layer_number", "layer_idx") if c in record), 0)
    counts = record["tokens_per_expert"]
    if isinstance(counts, dict):
        pairs = list(counts.items())
    elif isinstance(counts, list) and counts and isinstance(counts[0], list):
        pairs = list(enumerate(counts))
    else:
        pairs = [(said, counts)]
    for layer, row in pairs:
        number = int(layer) if str(layer).isdecimal() and len(str(layer)) < 9 else -1
        if not 0 <= number <= MOST_LAYERS:
            raise ValueError(f'layer "{_plain(str(layer))[:40]}" is not within 0 to {MOST_LAYERS}')
        if not isinstance(row, list) or not 0 < len(row) <= MOST_EXPERTS:
            raise ValueError(f"tokens_per_expert is not a list of 1 to {MOST_EXPERTS} counts")
        for expert, count in enumerate(row):
            if not _is_count(count):
                raise ValueError(
                    f"tokens_per_expert: {_plain(json.dumps(count))[:40]} of expert {expert} is not a whole "
                    f"number within 0 to {MOST_COUNT}"
                )
        yield number, np.array(row, dtype=float).astype(np.int64)


def _is_count(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= MOST_COUNT and value == int(value)  # type: ignore[operator,call-overload]


# --- carried in a scenario ------------------------------------------------------------------------


def packed(routing: Routing) -> str:
    """A measurement as text that a scenario can carry.

    Raises   DocumentError where it is too long; its counts may still do
    """
    kept = routing.counts if routing.ids is None else routing.ids
    small = kept.astype(np.min_scalar_type(int(kept.max())))
    head = {
        "name": routing.name,
        "top_k": routing.top_k,
        "layers": routing.layers,
        "experts": routing.counts.shape[1],
        "shape": small.shape,
        "dtype": small.dtype.str,
        "again": routing.again,
    }
    raw = json.dumps(head).encode() + b"\n" + small.tobytes()
    text = base64.b64encode(zlib.compress(raw, 9)).decode()
    if len(text) > LONGEST:
        raise DocumentError(
            f"is {len(text) / 2**20:.0f} MiB when packed, at most {LONGEST // 2**20} are carried; "
            "take fewer tokens"
        )
    return text


@lru_cache(maxsize=4)
def unpacked(text: str) -> Routing:
    """What `packed` made text of. Raises DocumentError where it is not that."""
    try:
        stream = zlib.decompressobj()
        raw = stream.decompress(base64.b64decode(text, validate=True), LARGEST_ARRAY)
        line, _, body = raw.partition(b"\n")
        head = json.loads(line)
        array = np.frombuffer(body, dtype=np.dtype(head["dtype"])).reshape(head["shape"])
        routing = _of_array(array, str(head["name"]), int(head["top_k"]))
        layers = tuple(int(n) for n in head["layers"])
        again = int(head.get("again", 0))
        missing = int(head["experts"]) - routing.counts.shape[1]
        if len(layers) != len(routing.counts) or not 0 <= missing <= MOST_EXPERTS:
            raise ValueError("layers")
    except (ValueError, KeyError, TypeError, zlib.error, binascii.Error, AttributeError) as error:
        raise DocumentError(f"is not what a scenario carries of measured counts ({error})") from None
    counts = np.pad(routing.counts, ((0, 0), (0, missing)))
    return Routing(routing.name, int(head["top_k"]), layers, counts, routing.ids, again)
