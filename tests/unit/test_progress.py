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


def test_the_time_left_is_that_of_the_phase(fresh, capsys):
    progress.show()
    bar = progress.Progress(300, game=100)
    game = {"generator": 1.0, "student": 2.0, "h_mean": 0.5}
    block = {"block": "a", "error": 0.1}
    for step, rate, of in [(50, 5, game), (100, 5, game), (150, 5, block)]:
        bar.update(step, {**of, "steps_per_second": rate})
    bar.update(200, {**block, "steps_per_second": 50})  # compiled before
    bar.update(300, {**block, "steps_per_second": 50})
    ends = [line.split("steps/s, ")[1] for line in capsys.readouterr().out.splitlines()]
    assert ends[:2] == [
        "0:00:10 to the reconstruction",
        "0:00:00 to the reconstruction",
    ]
    # 150 steps at 5 a second, then 100 at the mean of 10 s and 1 s for 50 steps each.
    assert ends[2:] == ["0:00:30 left", "0:00:11 left", "0:00:00 left"]
