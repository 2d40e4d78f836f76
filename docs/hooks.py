"""What mkdocs does here beside its plugins: pages made of other files, and formulas.

Pages are made of the package's settings, of documents that lie elsewhere in the
repository, and of the notebook, which is not executed. Nothing is downloaded.
"""

import base64
import itertools
import json
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File

from adadfq_jax import settings

ROOT = Path(__file__).parent.parent
NOTEBOOK = "notebooks/quantize.ipynb"
# Pages that are documents which lie elsewhere, where they are read as well.
PAGES = {
    "contributing/changelog.md": "CHANGELOG.md",
    "contributing/recorded.md": "tests/golden/README.md",
    "guides/pods.md": "launch/README.md",
}
KEYS = "<!-- the configuration keys stand here -->"

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_FORMULA = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"\$`(.+?)`\$")


def on_files(files, config):
    """Add the page that the notebook becomes, and its pictures."""
    for name, content in notebook_files(ROOT / "docs" / NOTEBOOK).items():
        files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Insert other documents, the configuration keys, and formulas as MathML."""
    source = PAGES.get(page.file.src_uri)
    if source is not None:
        return without_repository_links((ROOT / source).read_text())
    markdown = markdown.replace(KEYS, configuration_keys())
    markdown = _FORMULA.sub(lambda found: _math(found[1], "block"), markdown)
    return _INLINE.sub(lambda found: _math(found[1], "inline"), markdown)


def configuration_keys() -> str:
    """Return every configuration key as Markdown, a table for each section."""
    parts = []
    for section, rows in itertools.groupby(
        settings.ROWS.items(), key=lambda item: item[0].rpartition(".")[0]
    ):
        lines = ["| key | default | meaning |", "|---|---|---|"]
        for key, row in rows:
            is_recipes = isinstance(row.default, type)
            default = "the recipe's" if is_recipes else f"`{row.default!r}`"
            lines.append(f"| `{key}` | {default} | {row.text} |")
        title = f"`{section}`" if section else "The run"
        parts.append("\n".join([f"## {title}", "", *lines]))
    return "\n\n".join(parts)


def notebook_files(path: Path) -> dict[str, Any]:
    """Return a notebook as a Markdown page and its pictures, by their names."""
    cells = json.loads(path.read_text())["cells"]
    made: dict[str, Any] = {}
    parts = []
    for number, cell in enumerate(cells, 1):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = ""
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{path.stem}-{number}.png"
                made[picture] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell above draws]({picture})")
            else:
                printed += "".join(output.get("text", data.get("text/plain", "")))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    made[f"{path.stem}.md"] = "\n\n".join(parts) + "\n"
    return made


def without_repository_links(text: str) -> str:
    """Return a document with the names of files of the repository, without links."""

    def unlinked(found: re.Match) -> str:
        label, target = found.groups()
        return found[0] if target.startswith(("#", "http")) else label

    return _LINK.sub(unlinked, text)


def _math(formula: str, display: str) -> str:
    """Return a formula in LaTeX as MathML, which browsers draw by themselves."""
    math = latex2mathml.converter.convert(formula, display=display).replace("\n", " ")
    return f'<div class="formula">{math}</div>' if display == "block" else math
