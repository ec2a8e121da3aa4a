"""Everything that can be held against measurements: the parts of `clustersim validate`.

To add a part, write what finds its errors and what writes its predictions, and add a line to PARTS; how it
is shown stands in `report.parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustersim.study.validate import save, validate_network
from clustersim.study.validate_kernels import save_kernels, validate_kernels


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of prediction.

    find  leave_out, whether to fit anew without what is foretold → its errors; `kept` in them says whether
          they are as small as stated
    save  (folder, leave_out) writes every prediction there
    """

    find: Callable[[bool], dict[str, Any]]
    save: Callable[[Path, bool], None]


def _serving(leave_out: bool) -> dict[str, Any]:
    """No measured serving run can be simulated yet; nothing is claimed and nothing missed."""
    return {"sets": [], "kept": True}


def validate(part: str, leave_out: bool = True) -> dict[str, Any]:
    """The errors of a part; of ALL, those of each part by its name, and whether all are `kept`.

    leave_out  as in Part.find
    """
    if part != ALL:
        return PARTS[part].find(leave_out)
    found = {name: one.find(leave_out) for name, one in PARTS.items()}
    return {**found, "kept": all(one["kept"] for one in found.values())}


def save_part(part: str, folder: Path, leave_out: bool = True) -> None:
    """Writes the predictions of a part; of ALL, those of each into a folder of its own.

    Raises   ClustersimError if the folder cannot be written
    """
    if part != ALL:
        PARTS[part].save(folder, leave_out)
        return
    for name, one in PARTS.items():
        one.save(folder / name, leave_out)


ALL = "all"
PARTS: Mapping[str, Part] = {
    "kernels": Part(validate_kernels, save_kernels),
    "network": Part(validate_network, lambda folder, _: save(folder)),
    "serving": Part(_serving, lambda folder, _: None),
}
