"""Programs that some tests need and that not every machine has."""

import importlib
import os
import shutil
from typing import Any

import pytest

LEFT_OUT = "left out"
_HOW = "on Debian and Ubuntu: apt-get install {}"


def find(*names: str) -> str:
    """Return the first program that is installed; leave the test out if none is.

    With CI=true in the environment a missing program is a failure.

    Args:
      *names: of the program, the one to install first.
    """
    for name in names:
        if found := shutil.which(name):
            return found
    how = _HOW.format(names[0])
    if os.environ.get("CI") == "true":
        pytest.fail(f"{names[0]} is not installed; {how}")
    pytest.skip(f"{LEFT_OUT} without {names[0]} ({how})")


def package(name: str, how: str = "", *, required: bool = True) -> Any:
    """Return a package that no extra installs; leave the test out if it is missing.

    With CI=true in the environment a missing package is a failure.

    Args:
      name: of the module.
      how: arguments of pip that install it, if not its name alone.
      required: whether tests/requirements.txt has it; otherwise it may be missing with
        CI=true, too.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        how = f"pip install {how or name}"
    if required and os.environ.get("CI") == "true":
        pytest.fail(f"{name} is not installed; {how}")
    return pytest.skip(f"{LEFT_OUT} without {name} ({how})")


def reason(report: pytest.TestReport) -> str | None:
    """Return why a test was left out for want of a program; None of any other."""
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return None
    text = report.longrepr[2].removeprefix("Skipped: ")
    return text if text.startswith(LEFT_OUT) else None
