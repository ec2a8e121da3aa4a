"""Takes the README's picture of a report: large_ep with uneven experts and a GPU that is slow.

python docs/report_picture.py      needs playwright, and a browser that it can drive
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from clustersim.study.inspecting import open_result
from clustersim.study.reporting import write_report
from clustersim.study.run import load, run_scenario

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "report.png"
#: What makes large_ep a case worth a look.
OVERRIDES = (
    "gating.skew=gini",
    "gating.gini=0.3",
    "workload.decode_steps=8",
    'faults=[{kind="slow_gpu", gpu=5, factor=1.3}]',
)
#: Of a page so wide, what lies between these two is shown, in CSS pixels.
WIDTH, FIRST, LAST, MARGIN = 1000, "figure#causes", "figure#timeline .plot", 16
MOST_BYTES = 300_000


def main() -> int:
    """Runs the case, writes its report into a temporary folder and takes the picture."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        print("no browser is installed; chromium or google-chrome is wanted", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        scenario = load(ROOT / "workloads" / "large_ep.toml", OVERRIDES)
        result = run_scenario(scenario).save(Path(folder) / "large_ep-slow")
        PICTURE.write_bytes(taken(write_report(open_result(str(result))), program))
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size:,} bytes")
    return 0 if PICTURE.stat().st_size <= MOST_BYTES else 1


def taken(report: Path, program: str) -> bytes:
    """The picture, PNG."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-drawn=all]", state="attached")
        first, last = (page.locator(one).bounding_box() for one in (FIRST, LAST))
        top, bottom = first["y"] - MARGIN, last["y"] + last["height"]
        clip = {"x": 0, "y": top, "width": WIDTH, "height": bottom - top}
        picture = page.screenshot(full_page=True, clip=clip)
        browser.close()
    return picture


if __name__ == "__main__":
    sys.exit(main())
