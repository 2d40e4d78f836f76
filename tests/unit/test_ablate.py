"""Comparisons: the grid, the table by hand, and the command on the smallest network."""

import json
import math

import pytest

from adadfq_jax import config as base_config
from adadfq_jax.errors import InputError, NumericalError
from adadfq_jax.jobs import ablate
from adadfq_jax.report import ablation
from adadfq_jax.training.spec import resolve
from adadfq_jax.training.workdir import METRICS_FILE, leave_failure


def result(arm, seed, last, seconds=10.0, bits="w4a4"):
    cell = ablate.Cell(ablate.Arm(arm, {}), bits, seed)
    return ablate.Result(
        cell, 90.0, 50.0, ((5, seconds / 2, 60.0), (10, seconds, last))
    )


def test_arms_and_settings():
    arm = ablate.parse_arm("calm: game.q_rate=3e-4 recipe=gdfq game.rate_drops=(5,7)")
    expected = {"game.q_rate": 3e-4, "recipe": "gdfq", "game.rate_drops": (5, 7)}
    assert arm == ablate.Arm("calm", expected)
    assert ablate.parse_arm("base") == ablate.Arm("base", {})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a b: seed=1", "NAME"),
        ("../up", "NAME"),
        ("x: seed", "KEY=VALUE"),
        ("x: game.q_rat=1", "game.q_rate"),
    ],
)
def test_other_arms_are_refused(text, named):
    with pytest.raises(InputError, match=named):
        ablate.parse_arm(text)


def test_all_activations_are_another_setting():
    cell = ablate.Cell(ablate.Arm("base", {}), "w4a4", 0)
    paper, everywhere = (
        ablate.Result(cell, 90.0, 50.0, ((1, 1.0, 60.0),), places=places)
        for places in ("nonlinearities", "all")
    )
    assert (paper.setting, everywhere.setting) == ("W4A4", "W4A4 all activations")


@pytest.mark.parametrize(
    ("arms", "bits", "seeds", "named"),
    [
        ("aa", ["w4a4"], [0], "--arm: a is given twice"),
        ("ab", ["w4a4", "w4a4"], [0], "--bits: w4a4"),
        ("ab", ["w4a4"], [0, 1, 0], "--seeds: 0"),
        ("ab", [], [0], "--bits"),
        ("ab", ["w4a4"], [], "--seeds"),
    ],
)
def test_cells_that_come_twice_or_not_at_all_are_refused(arms, bits, seeds, named):
    with pytest.raises(InputError, match=named):
        ablate.cells([ablate.Arm(name, {}) for name in arms], bits, seeds)


@pytest.mark.parametrize("key", ["seed", "quant.weight_bits"])
def test_what_a_cell_has_is_not_set_for_all(key):
    cell = ablate.Cell(ablate.Arm("base", {}), "w4a4", 0)
    with pytest.raises(InputError, match=rf"--set: config\.{key}"):
        ablate.configure(lambda _: base_config.default_config(), cell, {key: 3})


def test_the_table_by_hand():
    results = [
        *(result("base", seed, last) for seed, last in enumerate((70.0, 72.0, 74.0))),
        # Twice as slow: at equal seconds only the first half is played.
        *(result("new", s, last, 20.0) for s, last in enumerate((71.0, 74.0, 74.0))),
        result("once", 1, 71.0),
    ]
    base, new, once = ablation.tabulate(results)
    assert (base.runs, base.last, base.spread, base.best) == (3, 72, 2, 72)
    assert math.isnan(base.difference)
    assert new.difference == pytest.approx(1.0)
    # Differences 1, 2, 0: standard deviation 1, t(0.975, 2) = 4.3027.
    assert new.half_width == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert (new.at_equal_seconds, base.at_equal_seconds) == (60, 72)
    assert (once.runs, once.difference) == (1, -1)
    assert math.isnan(once.half_width) and math.isnan(once.spread)
    text = ablation.to_markdown([base, new, once])
    numbers = "3 | 10 | 50.00 | 73.00 | 1.73 | 73.00 | +1.00 | 2.48"
    assert f"| W4A4 | new | {numbers} |" in text
    assert ablation.unequal_steps([base, new, once]) == ""
    longer = new._replace(steps=20)
    assert ablation.unequal_steps([base, longer]).startswith("\nW4A4: the arms differ")
    assert not ablation.unequal_steps([base, longer._replace(bits="W3A3")])


def test_ends_of_other_bits_are_never_compared_with_the_others():
    ends = [result("ends", s, last) for s, last in enumerate((80.0, 82.0))]
    ends = [r._replace(first_last_bits=8) for r in ends]
    more = [result("more", s, last) for s, last in enumerate((81.0, 83.0))]
    more = [r._replace(first_last_bits=8) for r in more]
    base = [result("base", s, last) for s, last in enumerate((70.0, 72.0))]
    first, second, third = ablation.tabulate([*base, *ends, *more])
    assert [row.bits for row in (first, second)] == ["W4A4", "W4A4 first/last 8"]
    assert math.isnan(first.difference) and math.isnan(second.difference)
    assert (third.bits, third.difference) == ("W4A4 first/last 8", 1)
    text = ablation.to_csv(ends)
    assert "w4a4 first/last 8,ends,0,10," in text


def test_a_cell_whose_numbers_failed_is_not_played_again(tmp_path, monkeypatch):
    played = []

    def fail(config, folder, stop):
        played.append(folder)
        folder.mkdir()
        leave_failure(folder, "step 3: not finite")
        raise NumericalError("step 3: not finite")

    monkeypatch.setattr(ablate.train, "run", fail)
    config = base_config.default_config()
    config.eval.dataset = "fashion_mnist"
    cell = ablate.Cell(ablate.Arm("wild", {}), "w4a4", 0)
    for _ in range(2):
        found = ablate.play(cell, config, tmp_path / "cell")
        assert found.failure == "step 3: not finite" and found.curve == ()
    assert len(played) == 1

    (tmp_path / "cell" / "config.json").write_text(
        json.dumps(resolve(config).to_json())
    )
    config.reconstruction.rate = 1e-3  # corrected
    with pytest.raises(InputError, match=r"config\.reconstruction\.rate"):
        ablate.play(cell, resolve(config), tmp_path / "cell")


def test_a_run_in_which_q_never_trains_has_its_last_too(tmp_path):
    rows = '{"step": 50, "steps_per_second": 5}\n{"step": 100, "steps_per_second": 10}'
    (tmp_path / METRICS_FILE).write_text(rows)
    summary = {"p_top1": 90.0, "evaluations": [{"step": 100, "q_top1": 80.0}]}
    found = ablate.read_result(
        ablate.Cell(ablate.Arm("a", {}), "w4a4", 0), summary, tmp_path
    )
    assert (found.before, found.last, found.best, found.seconds) == (80, 80, 80, 15)
