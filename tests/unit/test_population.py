"""Populations: their lists of values, their layouts, their table."""

import pytest

from adadfq_jax import settings
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import members
from adadfq_jax.report import population_table
from adadfq_jax.training import population
from adadfq_jax.training.spec import resolve
from tests.jobs import tiny_config


def test_members_take_the_values_of_the_lists_in_turn():
    found = members.parse("seed=3,4 game.q_rate=1e-3,3e-4")
    assert found == [
        members.Member("seed-3_q_rate-0.001", {"seed": 3, "game.q_rate": 1e-3}),
        members.Member("seed-4_q_rate-0.0003", {"seed": 4, "game.q_rate": 3e-4}),
    ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed=0,1 game.lambda_l=0.1", "seed has 2, game.lambda_l has 1"),
        ("seed=0,1 game.steps=5,6", "cannot differ in game.steps"),
        ("seed", "KEY=VALUE"),
        ("seed=0,1 seed=2,3", "twice"),
        ("seed=0,1,0", "seed-0 is there twice"),
        ("seed=0", "two members"),
        (" ", "two members"),
        ("seed=0,0.5", "'0.5' is not a whole number"),
        ("game.q_rate=1e-3,fast", "'fast' is not a number"),
        ("game.q_rate=1e-3,", "'' is not a number"),
        ("seed=0,True", "'True' is not a whole number"),
    ],
)
def test_other_lists_are_refused(text, named):
    with pytest.raises(InputError, match=r"population=") as refused:
        members.parse(text)
    assert named in str(refused.value)


def test_a_member_that_cannot_be_played_is_refused_by_name(job):
    config = resolve(tiny_config(job))
    member = members.parse("game.lambda_l=0.1,0.9")[1]
    with pytest.raises(InputError, match=r"member lambda_l-0\.9: game\.lambda_l"):
        members.configure(config, member)


def test_a_members_configuration_is_that_of_a_game_alone(job):
    spec = resolve(tiny_config(job, population="seed=0,5"))
    own = members.configure(spec, members.parse(spec.population)[1])
    assert own == resolve(tiny_config(job, seed=5))
    assert settings.is_identity("seed") and not settings.is_identity("population")


@pytest.mark.parametrize(
    ("count", "devices", "at_once", "expected"),
    [
        (3, 0, 0, (3, 1, 1)),  # of eight
        (16, 0, 0, (8, 2, 1)),
        (6, 2, 0, (2, 3, 1)),
        (6, 2, 3, (2, 1, 3)),
        (11, 0, 0, (1, 11, 1)),
    ],
)
def test_layouts(count, devices, at_once, expected):
    layout = population.choose_layout(count, devices, at_once)
    assert (len(layout.devices), layout.rounds, layout.at_once) == expected


def test_layouts_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match=r"devices=4: 6 members .* devices=3"):
        population.choose_layout(6, 4, 0)
    with pytest.raises(InputError, match=r"members_at_once=2.* 3 members"):
        population.choose_layout(6, 2, 2)


def test_means_are_over_the_members_that_differ_in_the_seed_alone():
    def row(seed, rate, last, failure=""):
        summary = {"q_before_top1": 50.0, "q_last_top1": last, "q_best_top1": last + 1}
        values = {"seed": seed, "game.q_rate": rate}
        found = None if failure else {**summary, "q_best_step": 9}
        return population_table.make_row(f"{seed}-{rate}", values, found, failure)

    rows = [
        row(0, 0.1, 70.0),
        row(1, 0.1, 74.0),
        row(2, 0.1, 0.0, "step 7: not finite: " + ", ".join(["student"] * 20)),
        row(0, 0.2, 60.0),
    ]
    first, second = population_table.means(rows)
    assert first.members == ["0-0.1", "1-0.1"]
    assert (first.last, first.best) == (72, 73)
    assert first.last_std == pytest.approx(8**0.5)  # sample standard deviation
    assert (second.last, second.last_std) == (60, None)
    text = population_table.to_text(rows)
    assert "72.00 ± 2.83" in text and "2-0.1 failed: step 7" in text
    assert max(map(len, text.splitlines())) <= 80
