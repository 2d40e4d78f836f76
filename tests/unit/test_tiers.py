"""The order of the tests themselves: what may import what."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent.parent
FILES = sorted(TESTS.rglob("*.py"))
# What starts processes or a browser.
STARTING = {
    *("subprocess", "multiprocessing", "tests.runs", "tests.browser"),
    *(
        "tests.launch_bench",
        "adadfq_jax.jobs.train",
    ),
}


def imported(path):
    """The names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_imports_a_test_module():
    modules = {path.stem for path in FILES if path.name.startswith("test_")}
    for path in FILES:
        for name in imported(path):
            assert not modules & set(name.split(".")), f"{path}: {name}"


def test_the_unit_tier_starts_no_process():
    for path in (TESTS / "unit").glob("*.py"):
        assert not imported(path) & STARTING, path


def test_every_test_module_is_in_a_tier():
    folders = {path.parent for path in FILES if path.name.startswith("test_")}
    assert {folder.name for folder in folders} == {"unit", "golden", "integration"}
    assert {folder.parent for folder in folders} == {TESTS}
