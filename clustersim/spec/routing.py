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
from dataclasses import dataclass
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
    """

    name: str
    top_k: int
    layers: tuple[int, ...]
    counts: np.ndarray
    ids: np.ndarray | None = None

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
        raise NoSuchMeasurement(f"holds {len(found)} measurements; name one: {_listed(found)}")
    if fitting:
        raise NoSuchMeasurement(f'holds {len(fitting)} measurements "{name}": {_listed(fitting)}')
    near = nearest(name, [one.name for one in found])
    raise NoSuchMeasurement(f'holds no measurement "{name}"{near}; there are {_listed(found)}')


def _listed(found: Sequence[Routing]) -> str:
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(f'"{one.name}"' for one in found[:_LISTED]) + more


def read_routing(path: Path, top_k: int = 0) -> list[Routing]:
    """All measurements of a file.

    top_k    experts of a token, where the file does not say
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
        return [_of_array(array, path.stem, top_k) for array in [_array(data)]]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DocumentError("is neither text nor npz nor npy") from None
    if text.lstrip()[:1] in ("{", "["):
        return [_of_json(text, path.stem, top_k)]
    return _of_csv(text, path.stem, top_k)


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
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.floor(array)).all()):
        raise DocumentError("holds numbers that are not whole")
    if (array < 0).any() or (array.ndim == 3 and array.max() >= MOST_EXPERTS):
        raise DocumentError(f"holds numbers that are no experts; wanted are 0 to {MOST_EXPERTS - 1}")
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
    counts = np.stack([np.bincount(ids[:, at].ravel(), minlength=experts) for at in range(layers)])
    return _checked(Routing(name, ids.shape[2], tuple(range(layers)), counts, ids))


def _checked(routing: Routing) -> Routing:
    if routing.counts.shape[1] > MOST_EXPERTS:
        raise DocumentError(f"has {routing.counts.shape[1]} experts; at most {MOST_EXPERTS} can be meant")
    empty = np.flatnonzero(routing.counts.sum(axis=1) == 0)
    if len(empty):
        raise DocumentError(f"layer {routing.layers[empty[0]]} has no tokens")
    return routing


# --- text -----------------------------------------------------------------------------------------

_LAYER, _EXPERT, _COUNT = ("layer", "layer_id"), ("expert", "expert_id"), ("count", "tokens")
_GROUP = ("model", "dataset", "topk", "top_k")


def _of_csv(text: str, stem: str, top_k: int) -> list[Routing]:
    rows = csv.DictReader(io.StringIO(text))
    columns = rows.fieldnames or []
    layer, expert, count = (
        next((c for c in names if c in columns), None) for names in (_LAYER, _EXPERT, _COUNT)
    )
    if layer is None or expert is None or count is None:
        said = ", ".join(str(c) for c in columns[:6])
        raise DocumentError(
            f"has columns {said}; wanted are layer,expert,count or layer_id,expert_id,count", 1
        )
    grouped = [c for c in _GROUP if c in columns]
    found: dict[tuple[str, ...], dict[tuple[int, int], int]] = {}
    experts: dict[tuple[str, ...], int] = {}
    for row in rows:
        line = rows.line_num
        key = tuple((row[c] or "").strip() for c in grouped)
        place = (_whole(row, layer, line, MOST_LAYERS), _whole(row, expert, line, MOST_EXPERTS))
        counts = found.setdefault(key, {})
        # A recorder that writes pass after pass names an expert again and again.
        counts[place] = counts.get(place, 0) + _whole(row, count, line, 2**53)
        if row.get("num_experts"):
            experts[key] = max(experts.get(key, 0), _whole(row, "num_experts", line, MOST_EXPERTS))
    if not found:
        raise DocumentError("has no rows")
    return [
        _of_counts(counts, key, grouped, stem, top_k, experts.get(key, 0)) for key, counts in found.items()
    ]


def _whole(row: dict[str, Any], column: str, line: int, most: int) -> int:
    text = (row[column] or "").strip()
    try:
        number = int(text)
    except ValueError:
        raise DocumentError(f'{column} "{text[:40]}" is not a whole number', line) from None
    if not 0 <= number <= most:
        raise DocumentError(f"{column} {number} is not within 0 to {most}", line)
    return number


def _of_counts(
    counts: dict[tuple[int, int], int],
    key: tuple[str, ...],
    grouped: list[str],
    stem: str,
    top_k: int,
    experts: int,
) -> Routing:
    layers = sorted({layer for layer, _ in counts})
    experts = max(experts, 1 + max(expert for _, expert in counts))
    table = np.zeros((len(layers), experts), dtype=np.int64)
    position = {layer: at for at, layer in enumerate(layers)}
    for (layer, expert), count in counts.items():
        table[position[layer], expert] = count
    said = dict(zip(grouped, key, strict=True))
    stated = said.pop("topk", "") or said.pop("top_k", "")
    k = int(stated) if stated.isdecimal() else top_k
    name = " ".join(part for part in (*said.values(), f"top-{k}" if stated else "") if part) or stem
    return _checked(Routing(name, k, tuple(layers), table))


def _of_json(text: str, stem: str, top_k: int) -> Routing:
    sums: dict[int, np.ndarray] = {}
    for line, record in _records(text):
        if not isinstance(record, dict) or "tokens_per_expert" not in record:
            raise DocumentError('has no "tokens_per_expert"', line)
        for layer, counts in _by_layer(record, line):
            if layer in sums and len(sums[layer]) != len(counts):
                raise DocumentError(
                    f"layer {layer} has {len(counts)} experts, and {len(sums[layer])} before", line
                )
            sums[layer] = sums.get(layer, 0) + counts
    if not sums:
        raise DocumentError("has no rows")
    if len({len(counts) for counts in sums.values()}) > 1:
        raise DocumentError("has layers with different numbers of experts")
    layers = tuple(sorted(sums))
    return _checked(Routing(stem, top_k, layers, np.stack([sums[layer] for layer in layers])))


def _records(text: str) -> Iterator[tuple[int, Any]]:
    lines = text.splitlines()
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, json.loads(line)
        return
    except (ValueError, RecursionError):
        if number > 1 and lines[0].strip() not in ("[", "{"):
            raise DocumentError("is not JSON", number) from None
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        raise DocumentError("is neither JSON lines nor JSON") from None
    for record in whole if isinstance(whole, list) else [whole]:
        yield 1, record


def _by_layer(record: dict[str, Any], line: int) -> Iterator[tuple[int, np.ndarray]]:
    said = next((record[c] for c in ("layer", "layer_id", "layer_number", "layer_idx") if c in record), 0)
    counts = record["tokens_per_expert"]
    if isinstance(counts, dict):
        pairs = list(counts.items())
    elif isinstance(counts, list) and counts and isinstance(counts[0], list):
        pairs = list(enumerate(counts))
    else:
        pairs = [(said, counts)]
    for layer, row in pairs:
        number = int(layer) if str(layer).isdecimal() else -1
        whole = isinstance(row, list) and all(
            isinstance(n, int | float) and n >= 0 and n == int(n) for n in row if n == n
        )
        if not whole or not row or not 0 <= number <= MOST_LAYERS:
            raise DocumentError("tokens_per_expert is not a list of counts, one per expert", line)
        yield number, np.array(row, dtype=float).astype(np.int64)


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
        missing = int(head["experts"]) - routing.counts.shape[1]
        if len(layers) != len(routing.counts) or not 0 <= missing <= MOST_EXPERTS:
            raise ValueError("layers")
    except (ValueError, KeyError, TypeError, zlib.error, binascii.Error, AttributeError) as error:
        raise DocumentError(f"is not what a scenario carries of measured counts ({error})") from None
    counts = np.pad(routing.counts, ((0, 0), (0, missing)))
    return Routing(routing.name, int(head["top_k"]), layers, counts, routing.ids)
