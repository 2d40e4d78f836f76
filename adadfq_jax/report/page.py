"""Self-contained HTML pages, without network access and without scripts."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from adadfq_jax.report.drawing import Figure

_STYLE = Path(__file__).parent / "style.css"
# A browser loads nothing from elsewhere, whatever the texts in a page contain.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_WIDE = ("images", "disputed-generated", "disputed-real")


def text(value: object) -> str:
    """Escape a value as text of a page."""
    return html.escape(str(value))


def figure(shown: Figure) -> str:
    """Render a figure with its title and its caption, which is its text alternative."""
    wide = ' class="wide"' if shown.name in _WIDE else ""
    name = text(shown.name)
    return (
        f'<figure id="{name}"{wide}><h3 id="title-{name}">{text(shown.title)}</h3>'
        f'{shown.body}<figcaption id="label-{name}">{text(shown.caption)}</figcaption>'
        "</figure>"
    )


def section(title: str, figures: Iterable[Figure | None], missing: str = "") -> str:
    """Render a heading and its figures, or the sentence `missing` if there are none."""
    there = [shown for shown in figures if shown is not None]
    if not there:
        return f"<h2>{text(title)}</h2><p>{text(missing)}</p>" if missing else ""
    return (
        f'<h2>{text(title)}</h2><div class="figures">'
        f"{''.join(figure(shown) for shown in there)}</div>"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()
) -> str:
    """Render a table of texts; the columns `numbers` are aligned to the right."""

    def kind(column: int) -> str:
        return ' class="number"' if column in numbers else ""

    def cell(column: int, value: object) -> str:
        return f"<td{kind(column)}>{text(value)}</td>"

    heads = "".join(
        f'<th scope="col"{kind(i)}>{text(name)}</th>' for i, name in enumerate(head)
    )
    body = "".join(
        f"<tr>{''.join(cell(i, value) for i, value in enumerate(row))}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="values"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """Render markup that is folded until the reader opens it."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def document(title: str, body: str) -> str:
    """Render a whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE.read_text()}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
