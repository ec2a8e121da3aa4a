"""How long a thousand GPUs take to be looked at and drawn. Run: pytest tests/bench --benchmark-only"""

from __future__ import annotations

import pytest

from clustersim.report.topology_svg import topology_svg
from clustersim.study.run import find
from clustersim.study.topology import drawing, inspect, load_machine


@pytest.mark.parametrize("name", ["dgx_h100_128", "planes_of_cards", "dragonfly"])
def test_a_machine_of_a_thousand_gpus(benchmark, name: str):
    def look() -> str:
        machine = load_machine(find(f"topologies/{name}.toml"))
        return topology_svg(inspect(machine), drawing(machine))

    assert benchmark(look).startswith("<svg")
