"""HTML that is escaped by construction: text becomes markup only through `el`; only `Html` passes unescaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Union

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
MAX_TEXT = 400
MAX_ROWS = 400
_VOID = frozenset({"img", "meta", "br"})
# What HTML forbids, what UTF-8 cannot encode, and what turns the direction of the text around it.
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


class Html(str):
    """Markup that was made here; any other string is text and gets escaped."""

    __slots__ = ()


Child = Union[str, int, float, None, Iterable["Child"]]  # noqa: UP007 (a recursive alias on 3.10)


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Text that can stand on a page: unfit characters replaced, cut at `limit` characters."""
    text = _UNFIT.sub("\ufffd", text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def escape(text: str, limit: int = MAX_TEXT) -> Html:
    """Text as markup."""
    return text if isinstance(text, Html) else Html(html.escape(clean(text, limit)))


def join(children: Iterable[Child]) -> Html:
    """Children one after the other."""
    return Html("".join(_render(child) for child in children))


def el(tag: str, /, *children: Child, **attributes: str | int | bool | None) -> Html:
    """An element. Attributes: `class_` for class, `_` for `-`; None and False leave one out."""
    parts = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(_UNFIT.sub("", str(value)))}"')
    opening = Html(f"<{' '.join(parts)}>")
    return opening if tag in _VOID else Html(f"{opening}{join(children)}</{tag}>")


@dataclass(frozen=True)
class Column:
    """A column of a table; `text` columns are left aligned, the others are numbers."""

    label: str
    text: bool = False


def data_table(
    caption: Child, columns: Sequence[Column], rows: Sequence[Sequence[Child]], *, total: bool = False,
    name: str | None = None, wide: bool = False,
) -> Html:  # fmt: skip
    """A table with headers; the first cell of a row heads it, the last of a row with too few spans what is left.

    caption: None where the heading above says it; then `name` is what the table is called to those who can't see it.
    total: the last row is set apart. wide: it may be wider than the text where the window is, and its first column
    stays in view where it is not.
    """
    head = el("tr", [el("th", c.label, scope="col", class_=None if c.text else "n") for c in columns])
    body = []
    for number, row in enumerate(rows[:MAX_ROWS]):
        spare = len(columns) - len(row) + 1
        cells = [
            el("th" if i == 0 else "td", cell, scope="row" if i == 0 else None,
               class_="across" if (last := i == len(row) - 1 and spare > 1) else None if column.text else "n",
               colspan=spare if last else None)
            for i, (column, cell) in enumerate(zip(columns, row, strict=False))
        ]  # fmt: skip
        body.append(el("tr", cells, class_="total" if total and number == len(rows) - 1 else None))
    left = len(rows) - MAX_ROWS
    name = name or re.sub("<[^>]*>", "", join([caption]))
    return el(
        "div",
        el("table", el("caption", caption) if caption else None, el("thead", head), el("tbody", body)),
        el("p", f"{left:,} more rows are not shown.", class_="note") if left > 0 else None,
        class_="scroll wide" if wide else "scroll", role="region", tabindex=0, aria_label=Html(html.unescape(name)),
    )  # fmt: skip


def figure(content: Child, caption: Child) -> Html:
    """A figure with its caption."""
    return el("figure", content, el("figcaption", caption))


def section(ident: str, title: str, *children: Child) -> Html:
    """A section of the page with its heading."""
    return el("section", el("h2", title, id=ident), list(children), aria_labelledby=ident)


def note(*children: Child) -> Html:
    """A remark under what it belongs to."""
    return el("p", list(children), class_="note")


def document(title: str, style: str, *children: Child) -> str:
    """A whole page that may load nothing and run nothing."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=CSP),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", title),
        el("style", Html(style)),
    )
    page = el("html", head, el("body", el("main", list(children))), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _render(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, str):
        return escape(child)
    if isinstance(child, (int, float)):
        return escape(str(child))
    return "".join(_render(item) for item in child)
