"""What is printed: log lines, from the level that was asked for."""

import logging

import pytest

from adadfq_jax.runtime import progress


@pytest.fixture
def fresh(monkeypatch):
    """The package's logger as a program finds it."""
    logger = logging.Logger("fresh")
    monkeypatch.setattr(progress, "log", logger)
    return logger


def speak(logger):
    logger.info("step 5")
    progress.say("a table")
    progress.say("WARNING: no report")
    logger.warning("again")


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (progress.STEPS, ["step 5", "a table", "WARNING: no report", "WARNING: again"]),
        (progress.RESULT, ["a table", "WARNING: no report", "WARNING: again"]),
        (progress.NOTHING, []),
    ],
)
def test_the_level_decides_what_is_printed(fresh, capsys, least, expected):
    progress.show()
    progress.show(least)  # a second call changes the level and prints nothing twice
    speak(fresh)
    assert capsys.readouterr().out.splitlines() == expected


def test_a_program_that_set_up_logging_keeps_it(fresh, capsys):
    seen = logging.NullHandler()
    seen.handle = lambda record: kept.append(record.getMessage())
    kept = []
    fresh.addHandler(seen)
    progress.show_by_default()
    speak(fresh)
    assert capsys.readouterr().out == ""
    assert kept == ["step 5", "a table", "no report", "again"]


def test_without_any_handler_lines_are_printed(fresh, capsys):
    progress.show_by_default()
    speak(fresh)
    assert capsys.readouterr().out.startswith("step 5\na table\n")
