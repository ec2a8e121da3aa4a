"""The families of models that are fitted to measurements, by their section of catalogue/network.toml."""

from __future__ import annotations

from clustersim.study.expert_fit import EXPERT_EXCHANGE
from clustersim.study.prediction import Family

#: Section → family. Order is that of catalogue/network.toml and of `clustersim validate network`.
FAMILIES: dict[str, Family] = {"expert_exchange": EXPERT_EXCHANGE}
