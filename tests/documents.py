"""The documents as a reader uses them: their blocks, commands and links.

`python -m tests.documents PAGE` runs the blocks of a page in the current folder, one
after the other. Its Python blocks share their names. A block is run unless the line
before it is a comment `<!-- not run: REASON -->`.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RUN = ("bash", "python")  # languages of the blocks that are run
_FENCE = re.compile(r"```(\w*)$")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->$")
_COMMAND = re.compile(r"(adadfq|python|PYTHONPATH=|\./|\.ci|\.venv|launch/|--)")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block: its place, language and text, and why it is not run, if so."""

    line: int
    language: str
    text: str
    reason: str | None


def pages() -> list[Path]:
    """Every document for readers, by its path in the repository."""
    tops = (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))
    found = [*tops, *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT) for path in found]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a document."""
    found: list[Block] = []
    start: tuple[int, str, str | None] | None = None
    inside: list[str] = []
    lines = (ROOT / page).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        fence = _FENCE.fullmatch(line)
        if start is not None:
            if fence:
                found.append(Block(start[0], start[1], "\n".join(inside), start[2]))
                start, inside = None, []
            else:
                inside.append(line)
        elif fence:
            marked = _NOT_RUN.fullmatch(lines[number - 2])
            start = number, fence[1], marked and marked[1]
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The command lines in a block, as words; those of a console without the prompt."""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.removeprefix("$ ")
        if _COMMAND.match(line):
            yield shlex.split(line, comments=True)


def links(page: Path) -> list[str]:
    """The relative links of a document, without their anchors."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    targets = (target.partition("#")[0] for target in _LINK.findall(text))
    return [target for target in targets if target and "://" not in target]


def run(page: Path) -> None:
    """Runs the blocks of a page in the current folder; an error ends it."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language not in RUN or block.reason is not None:
            continue
        print(f"--- {page}:{block.line}", flush=True)
        if block.language == "python":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), names)
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.text]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
