"""A page of figures as one HTML file that needs nothing else. The only door to the plotting library.

The library's script, ours, the figures and the style stand in the file; the page's policy lets nothing be
loaded and no other script run, so that words from files could do nothing even if they were not escaped.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from clustersim.report.html_parts import Figure, Section, section_html, text
from clustersim.report.html_theme import THEMES, variables

_HERE = Path(__file__).parent


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page as HTML.

    title     of the page
    lead      HTML that stands above the sections, under the title
    sections  in their order; the table of contents is made from them
    """
    figures = [part for section in sections for part in section.parts if isinstance(part, Figure)]
    library, ours = _script(get_plotlyjs()), _script(_beside("js"))
    contents = "".join(f'<li><a href="#{one.name}">{text(one.title)}</a></li>' for one in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy([library, ours])}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="clustersim">\n'
        f"<title>{text(title)}</title>\n<style>\n{variables()}{_beside('css')}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#content">To the content</a>\n<header>\n<h1>{text(title)}</h1>\n{lead}\n'
        f'</header>\n<nav aria-label="Contents"><ul>{contents}</ul></nav>\n<main id="content">\n'
        "<noscript><p>Figures are drawn by a script of this page; without it their numbers stand in the "
        "tables.</p></noscript>\n"
        f"{''.join(map(section_html, sections))}</main>\n"
        f'<script type="application/json" id="figures">{_data(figures)}</script>\n'
        f"<script>{library}</script>\n<script>{ours}</script>\n</body>\n</html>\n"
    )


def packed(values: np.ndarray, full: float) -> dict[str, Any]:
    """Rows of a heat map with one byte a cell.

    values   float[rows, columns] from 0 to `full`; NaN is not known
    """
    steps = np.where(np.isnan(values), 255, np.rint(np.clip(values / full, 0.0, 1.0) * _STEPS))
    return {
        "bytes": b64encode(steps.astype(np.uint8).tobytes()).decode(),
        "rows": values.shape[0],
        "columns": values.shape[1],
        "full": full,
        "steps": _STEPS,
    }


#: Values that a byte tells apart, from nothing to full; 255 is not known.
_STEPS = 250


def _beside(kind: str) -> str:
    return (_HERE / f"html.{kind}").read_text(encoding="utf-8")


def _script(source: str) -> str:
    # What would end the element or hide its end; inside of JavaScript both are the same as before.
    return source.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is loaded, no address is asked, and only these scripts run."""
    hashes = " ".join(f"'sha256-{b64encode(sha256(one.encode()).digest()).decode()}'" for one in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _data(figures: Sequence[Figure]) -> str:
    """What the page's script draws, as JSON that cannot end its element."""
    content = {"themes": THEMES, "figures": [_figure(one) for one in figures]}
    said = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return said.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _figure(figure: Figure) -> Mapping[str, Any]:
    first = {what: choices[0] for what, choices in figure.choices.items()}
    return {"name": figure.name, "first": first, **figure.plot}
