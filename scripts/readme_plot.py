"""Make docs/images/table4.svg: quality against cost of the rows of Table 4, as drawn in docs/studies/table4.

The page colours its drawings by its style sheet; a file that stands alone needs the colours in it.

    python scripts/readme_plot.py
"""

from __future__ import annotations

import re
from pathlib import Path

from grafting.report.style import CSS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def standalone(svg: str) -> str:
    """The page's drawing as a file of its own, in the light colours."""
    colors = dict(re.findall(r"--(\w+):(#\w+)", CSS.split("@media")[0]))
    svg = svg.replace("<svg ", '<svg width="640" ', 1)
    svg = re.sub(r"var\(--(\w+)\)", lambda found: colors[found[1]], svg)
    (size,) = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    paper = f'<rect width="{size[0]}" height="{size[1]}" fill="{colors["paper"]}"/>'
    start = svg.index(">") + 1
    return svg[: start - 1] + ' font-family="system-ui, sans-serif">' + paper + svg[start:] + "\n"


def main() -> None:
    page = (DOCS / "studies" / "table4" / "study.html").read_text(encoding="utf-8")
    drawn = re.search(r"<svg.*?</svg>", page, flags=re.S)
    if drawn is None:
        raise SystemExit("docs/studies/table4/study.html holds no drawing")
    target = DOCS / "images" / "table4.svg"
    target.write_text(standalone(drawn[0]), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
