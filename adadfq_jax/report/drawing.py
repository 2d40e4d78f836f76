"""Conversion of matplotlib plots to inline SVG with text and colours of both themes."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from xml.etree import ElementTree

from adadfq_jax.runtime import extras

# Okabe and Ito's colours. In the page each is a custom property, for which style.css
# has a tone in each theme. Every tone contrasts with the card and differs from the
# others for colour-blind readers, too.
COLORS = {
    "blue": "#0072b2",
    "orange": "#e69f00",
    "green": "#009e73",
    "red": "#d55e00",
    "purple": "#cc79a7",
    "sky": "#56b4e9",
}
CYCLE = ("blue", "red", "green", "orange", "purple", "sky")
INK, _RULE = "#111111", "#dddddd"
_PROPERTIES = {
    **{code: f"var(--{color})" for color, code in COLORS.items()},
    INK: "currentColor",
    _RULE: "var(--rule)",
}
_COLOR = re.compile("|".join(_PROPERTIES))
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_REFERENCE = re.compile(r"(?:(?<=^)|(?<=url\())#([\w-]+)")
WIDTH = 4.4  # inches, or 317 units: a phone shows the text without shrinking it
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


class Figure(NamedTuple):
    """A figure of a page.

    Attributes:
      name: a word, the figure's address in the page.
      title: plain text.
      caption: plain text, which has the figure's numbers.
      body: markup, an instance of `markupsafe.Markup`.
      wide: whether it takes the whole width of the page.
    """

    name: str
    title: str
    caption: str
    body: Any
    wide: bool = False


def need_matplotlib(what: str = "a report") -> None:
    """Raise InputError if matplotlib, which `what` needs, is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise extras.missing(what, "matplotlib", "report") from error


class Canvas:
    """A plot: draw on `axes`, and `finish` sets `svg`."""

    def __init__(self, name: str, height: float):
        from matplotlib.figure import Figure as MatplotlibFigure

        self._name = name
        self._figure = MatplotlibFigure(figsize=(WIDTH, height), layout="constrained")
        self._figure.patch.set_alpha(0)
        self.axes: Any = self._figure.subplots()
        self.axes.patch.set_alpha(0)
        self.svg = ""

    def legend(self, columns: int) -> None:
        """Add a legend above the plot, where it hides no data."""
        self._figure.legend(loc="outside upper left", ncols=columns)

    def finish(self) -> None:
        """Render the plot to `svg`."""
        from matplotlib.ticker import MaxNLocator

        if self.axes.get_xlabel() == "step":
            self.axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        text = io.StringIO()
        self._figure.savefig(text, format="svg", metadata={"Date": None})
        self.svg = to_inline(text.getvalue(), self._name)


@contextmanager
def canvas(name: str, height: float = 2.8) -> Iterator[Canvas]:
    """Open a plot `height` inches high, and finish it at the end of the block."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        plot = Canvas(name, height)
        yield plot
        plot.finish()


def to_inline(svg: str, name: str) -> str:
    """Convert a stand-alone SVG for a page, where `label-NAME` is its label.

    Metadata and the style sheet are removed, because the style sheet would apply to the
    whole page. Ids without references are removed; the others get the prefix `NAME-`.
    """
    from markupsafe import Markup

    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = {found for value in values for found in _REFERENCE.findall(value)}
    for element in root.iter():
        if (identity := element.attrib.pop("id", None)) in used:
            element.set("id", f"{name}-{identity}")
        for key, value in element.attrib.items():
            named = _REFERENCE.sub(rf"#{name}-\1", value)
            element.set(key, _COLOR.sub(lambda found: _PROPERTIES[found[0]], named))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"title-{name} label-{name}")
    return Markup(ElementTree.tostring(root, encoding="unicode"))
