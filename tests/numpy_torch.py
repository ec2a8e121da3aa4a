"""As much of torch as the kernels of `clustersim measure` call, on numpy: shapes and values, no speed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


class Tensor(np.ndarray):
    """An array with torch's methods where they differ from numpy's."""

    def transpose(self, *axes: Any) -> Any:
        """Swaps two axes."""
        return np.swapaxes(np.asarray(self), *axes).view(Tensor)

    def t(self) -> Any:
        """The transposed matrix."""
        assert self.ndim == 2
        return self.transpose(0, 1)

    def to(self, dtype: Any) -> Any:
        """Another number format; the same numbers here."""
        return self

    def unsqueeze(self, axis: int) -> Any:
        """One more axis."""
        return np.expand_dims(np.asarray(self), axis).view(Tensor)

    def chunk(self, parts: int, dim: int) -> Any:
        """Equal parts."""
        return [part.view(Tensor) for part in np.split(np.asarray(self), parts, axis=dim)]

    def index_select(self, dim: int, index: Any) -> Any:
        """Some rows."""
        return np.take(np.asarray(self), np.asarray(index), axis=dim).view(Tensor)

    def index_add_(self, dim: int, index: Any, rows: Any) -> Any:
        """Adds rows in place."""
        assert dim == 0 and rows.shape == (len(index), *self.shape[1:])
        np.add.at(self, np.asarray(index), np.asarray(rows))
        return self


def tensor(values: Any) -> Any:
    """An array as a Tensor."""
    return np.asarray(values).view(Tensor)


def numpy_torch(seed: int = 0, capability: tuple[int, int] = (9, 0)) -> Any:
    """The module."""
    rng = np.random.default_rng(seed)
    functional = SimpleNamespace(
        linear=lambda x, w: tensor(np.asarray(x) @ np.asarray(w).T),
        scaled_dot_product_attention=_attention,
        silu=lambda x: x / (1 + np.exp(-x)),
        embedding=lambda index, table: tensor(np.asarray(table)[np.asarray(index)]),
        rms_norm=_rms_norm,
    )
    kinds = SimpleNamespace(FLASH_ATTENTION=0, CUDNN_ATTENTION=1, EFFICIENT_ATTENTION=2)
    properties = SimpleNamespace(name="numpy", L2_cache_size=1 << 10)
    return SimpleNamespace(
        randn=lambda *shape, **how: tensor(rng.standard_normal(shape)),
        rand=lambda *shape, **how: tensor(rng.random(shape)),
        randint=lambda high, shape, **how: tensor(rng.integers(high, size=shape)),
        arange=lambda n, **how: tensor(np.arange(n)),
        tensor=lambda values, **how: tensor(values),
        ones=lambda shape, **how: tensor(np.ones(shape)),
        zeros_like=lambda x: tensor(np.zeros_like(x)),
        cat=lambda parts, dim=0: tensor(np.concatenate([np.asarray(part) for part in parts], axis=dim)),
        matmul=lambda a, b: tensor(np.matmul(np.asarray(a), np.asarray(b))),
        softmax=_softmax,
        add=lambda a, b: a + b,
        compile=lambda function, dynamic: function,
        bfloat16="bf16",
        float8_e4m3fn="fp8",
        int32="int32",
        _scaled_mm=lambda a, b, **how: tensor(np.asarray(a) @ np.asarray(b)),
        _grouped_mm=_grouped,
        nn=SimpleNamespace(
            functional=functional, attention=SimpleNamespace(SDPBackend=kinds, sdpa_kernel=lambda kind: None)
        ),
        cuda=SimpleNamespace(
            get_device_capability=lambda: capability,
            current_device=lambda: 0,
            get_device_properties=lambda device: properties,
            empty_cache=lambda: None,
            OutOfMemoryError=MemoryError,
        ),
    )


def _softmax(x: Any, dim: int) -> Any:
    powers = np.exp(x - x.max(axis=dim, keepdims=True))
    return tensor(powers / powers.sum(axis=dim, keepdims=True))


def _rms_norm(x: Any, shape: tuple[int, ...], weight: Any, eps: float) -> Any:
    assert x.shape[-1:] == shape
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def _attention(
    q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False
) -> Any:
    q, k, v = (np.asarray(one) for one in (q, k, v))
    if enable_gqa:
        k, v = (np.repeat(one, q.shape[1] // one.shape[1], axis=1) for one in (k, v))
    assert q.shape[:2] == k.shape[:2] == v.shape[:2]
    scores = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    return tensor(np.asarray(_softmax(scores, -1)) @ v)


def _grouped(rows: Any, matrices: Any, offs: Any) -> Any:
    """Rows of group g, which end at offs[g], times matrix g."""
    assert len(matrices) == len(offs) and offs[-1] == len(rows)
    starts = np.concatenate([[0], np.asarray(offs)[:-1]])
    parts = [np.asarray(rows)[a:b] @ np.asarray(m) for a, b, m in zip(starts, offs, matrices, strict=True)]
    return tensor(np.concatenate(parts))
