"""GPUs by any name people and files of measurements call them."""

from __future__ import annotations

from functools import cache

from clustersim.errors import ClustersimError
from clustersim.spec.hardware import Gpu
from clustersim.spec.reading import read_catalogue
from clustersim.spec.references import catalogue_name, not_in_catalogue


@cache
def gpu_named(name: str) -> Gpu:
    """A GPU of the catalogue by its name or any alias, as `references.catalogue_name` compares them.

    Raises   ClustersimError with the nearest name
    """
    found = catalogue_name("gpus", name)
    if found is None:
        raise ClustersimError(f"GPU: {not_in_catalogue('gpus', name)}")
    return _gpus()[found]


@cache
def siblings(name: str) -> tuple[str, ...]:
    """GPUs of the catalogue that are of one architecture with this one, and have it, or its relative, for
    their relative: what was measured of an A800 holds for an A100 as well."""
    own = _gpus().get(name)
    if own is None:
        return ()
    near = {name, own.relative} - {None}
    return tuple(
        other.name
        for other in _gpus().values()
        if other.name != name and other.relative in near and other.architecture == own.architecture
    )


@cache
def _gpus() -> dict[str, Gpu]:
    return {name: entry for name, entry in read_catalogue("gpus").items() if isinstance(entry, Gpu)}
