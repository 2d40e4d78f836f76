"""Whole runs in this process: fetches, several steps in a dispatch."""

import numpy as np
import pytest

from adadfq_jax.errors import InputError
from adadfq_jax.jobs import train
from adadfq_jax.runtime import sharding
from adadfq_jax.training.run import Run
from tests.jobs import rows, tiny_config

# At 4 bits one activation that takes the other code shows in the logits.
FINE = {"quant.weight_bits": 8, "quant.act_bits": 8}


@pytest.fixture(scope="module")
def step_by_step(job, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    train.run(tiny_config(job, **FINE), workdir)
    return workdir


def test_the_loop_fetches_once_an_interval(job, tmp_path, monkeypatch):
    fetched = []
    real = sharding.fetch

    def fetch(tree):
        fetched.append(tree)
        return real(tree)

    monkeypatch.setattr(sharding, "fetch", fetch)
    monkeypatch.setattr(Run, "write_network", lambda self, state: (0, {}))
    monkeypatch.setattr(Run, "summarise", lambda *_: {})
    monkeypatch.setattr(train.exports, "export_files", lambda *_: None)
    monkeypatch.setattr(train.results, "table", lambda *_: "")
    train.run(tiny_config(job, **{"log.every": 3}), tmp_path / "run")
    # Intervals end at 3, 4 (a phase ends), 6, 9 and 12; then the last save.
    intervals = len(rows(tmp_path / "run"))
    assert len(fetched) == intervals + 1
    metrics, saved = fetched[:-1], fetched[-1]
    assert sum(len(interval) for interval in metrics) == 12
    assert int(saved.step) == 12


def test_several_steps_in_a_dispatch_play_the_same_game(job, step_by_step, tmp_path):
    config = tiny_config(job, steps_per_dispatch=4, **FINE)
    train.run(config, tmp_path / "run")
    ours, theirs = rows(tmp_path / "run"), rows(step_by_step)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for name in ("bn_stats", "agreement", "p_agrees", "g_rate", "q_rate"):
        found, expected = ([r[name] for r in some] for some in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)


def test_steps_that_do_not_fill_a_dispatch_are_played_one_by_one(job, tmp_path):
    config = tiny_config(job, **{"steps_per_dispatch": 4, "log.every": 5})
    train.run(config, tmp_path / "run")
    # 4 in one, 1 alone, then 4 and 1, then 2 alone.
    assert [r["step"] for r in rows(tmp_path / "run")] == [4, 5, 10, 12]


def test_bfloat16_is_of_g_and_p_and_stays_near(job, step_by_step, tmp_path):
    config = tiny_config(job, compute_dtype="bfloat16", **FINE)
    train.run(config, tmp_path / "run")
    ours, theirs = rows(tmp_path / "run"), rows(step_by_step)
    for name in ("bn_stats", "agreement"):
        found, expected = ours[0][name], theirs[0][name]
        assert found != expected
        assert found == pytest.approx(expected, rel=0.02)


def test_the_folder_is_held_until_the_exports_are_written(
    job, step_by_step, monkeypatch
):
    """A finished run is held, too, since a repeated command may export again."""

    def start_another(spec, file, workdir, function):
        with pytest.raises(InputError, match="another run is using it"):
            train.run(tiny_config(job, **FINE), workdir)

    called = []
    real = train.exports.export_files

    def once(*given):
        called.append(given)
        return start_another(*given) if len(called) == 1 else real(*given)

    monkeypatch.setattr(train.exports, "export_files", once)
    monkeypatch.setattr(train.results, "table", lambda *_: "")
    train.run(tiny_config(job, **FINE), step_by_step)
    assert len(called) == 1
