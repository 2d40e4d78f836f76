"""Tables for a terminal and for Markdown, and numbers in them."""

import io
import itertools
import math
from collections.abc import Iterable, Sequence

WIDTH = 80  # columns of a terminal


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    """Write a number, or '-' where there is none (None or nan)."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:{sign}.{digits}f}"


def percent(value: float | None) -> str:
    """Write per cent, or '-' where there is no value."""
    return "-" if value is None else f"{value:.2f} %"


def with_spread(mean: float | None, std: float | None) -> str:
    """Write 'mean ± std', or the mean alone where there is no std."""
    spread = number(std)
    return number(mean) + ("" if spread == "-" else f" ± {spread}")


def to_text(
    title: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    align: str = "lr",
    width: int = WIDTH,
    caption: str | None = None,
) -> str:
    """Render a table for a terminal.

    Args:
      title: of the table.
      head: names of the columns.
      rows: texts of the cells.
      align: 'l' (left, folded where it is long) or 'r' (right, not folded) for each
        column; the last letter is that of all further columns.
      width: the most columns of the terminal that it takes.
      caption: text below the table.
    """
    import rich.box  # here: Markdown is written without rich
    import rich.console
    import rich.markup
    import rich.table

    view = rich.table.Table(
        title=title, caption=caption, box=rich.box.SIMPLE, padding=(0, 1, 0, 0)
    )
    for name, side in itertools.zip_longest(head, align, fillvalue=align[-1]):
        right = side == "r"
        view.add_column(
            name,
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=right,
        )
    for row in rows:
        view.add_row(*(rich.markup.escape(cell) for cell in row))
    text = io.StringIO()
    rich.console.Console(file=text, width=width).print(view)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def to_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table as Markdown."""
    lines = [head, ["-" * max(3, len(name)) for name in head], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
