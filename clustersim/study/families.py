"""The families of models that are fitted to measurements, by their section of the catalogue's files."""

from __future__ import annotations

from clustersim.study.collectives import COLLECTIVES
from clustersim.study.expert_fit import EXPERT_EXCHANGE
from clustersim.study.prediction import Family

#: Section → family. Order is that of the fitted files and of `clustersim validate network`.
FAMILIES: dict[str, Family] = {family.section: family for family in (COLLECTIVES, EXPERT_EXCHANGE)}
