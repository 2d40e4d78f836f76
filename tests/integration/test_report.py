"""The report of a run: recorded on the way, written at its end, seen in a browser."""

import json
import shutil
import signal

import pytest

from adadfq_jax.jobs import train
from adadfq_jax.report import (
    curves,
    gather,
    record,
    run_page,
    snapshot,
)
from adadfq_jax.report import page as pages
from tests import browser, jobs, runs
from tests.jobs import RECORDING, measured, tiny_config
from tests.pages import assert_sound, names
from tests.runs import start, wait_for

ALWAYS = {
    *("h-bands", "h-histogram", "p-agrees", "loss-generator", "loss-student"),
    *("loss-margin", "loss-bn_stats", "images", "confusion-generated", "sizes"),
    *("kernel-noise", "activation-noise", "kernel-ranges", "activation-ranges"),
    *("rates", "speed"),
}
WITH_EVALUATION = {"accuracy", "confusion-real", "real-activation-ranges"}


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_every_figure_is_rendered(reported, width, dark):
    seen = browser.look(reported / "report" / "index.html", width, dark)
    assert_sound(seen, width)
    assert names(seen) >= ALWAYS | WITH_EVALUATION
    assert seen["paper"] == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")
    summary = json.loads((reported / "summary.json").read_text())
    assert f"top-1 {summary['q_last_top1']:.2f} %" in seen["text"]
    assert "adadfq --name='<b>&'" in seen["text"]


def test_on_paper_it_is_light_and_unfolded(reported):
    page = reported / "report" / "index.html"
    assert "game.q_weight_decay" not in browser.look(page)["text"]
    seen = browser.look(page, 700, dark=True, media="print")
    assert_sound(seen, 700)
    assert seen["paper"] == "rgb(255, 255, 255)"
    assert "game.q_weight_decay" in seen["text"]


def test_a_run_without_evaluation(job, tmp_path):
    train.run(tiny_config(job, **RECORDING), tmp_path / "run")
    seen = browser.look(tmp_path / "run" / "report" / "index.html")
    assert_sound(seen, 1280)
    assert names(seen) >= ALWAYS
    assert not names(seen) & WITH_EVALUATION
    for said in ("accuracy not measured", "no evaluation to show", "no evaluation im"):
        assert said in seen["text"]


def test_a_run_of_100_classes(tmp_path):
    job = jobs.make_job(tmp_path, 100)
    settings = {**measured(job), "teacher.num_classes": 100}
    train.run(tiny_config(job, **settings), tmp_path / "run")
    seen = browser.look(tmp_path / "run" / "report" / "index.html", 390)
    assert_sound(seen, 390)
    assert names(seen) >= ALWAYS | WITH_EVALUATION
    (images,) = (f for f in seen["figures"] if f["id"] == "images")
    classes = record.classes_shown(100)
    assert f"classes: {', '.join(map(str, classes))}." in images["caption"]


def test_a_killed_run_has_a_report_and_ends_in_the_same_bytes(job, finished, tmp_path):
    """The run beside it recorded nothing."""
    workdir = tmp_path / "run"
    arguments = job.arguments(f"--workdir={workdir}", "--config.report.enabled=True")
    process = start(arguments)
    wait_for(process, "step 16/20")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = runs.main("--mode=report", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    page = workdir / "report" / "index.html"
    assert done.stdout.strip() == str(page)
    seen = browser.look(page)
    assert_sound(seen, 1280)
    assert names(seen) >= (ALWAYS | WITH_EVALUATION) - {"sizes"}
    assert "not finished, " in seen["text"] and "of 20 steps" in seen["text"]

    late = snapshot.path_of(workdir, 19)
    late.write_bytes(b"of a game that was cut short")
    done = runs.main(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"report: {page}" in done.stdout
    assert not late.exists()
    assert snapshot.steps(workdir) == [6, 10, 15, 20]
    name = "quantized.safetensors"
    assert (workdir / name).read_bytes() == (finished / name).read_bytes()


def test_close_boundaries_have_legible_names(reported, tmp_path):
    run = gather.read(reported)
    for low, high in ((0.5, 0.53), (0.0, 0.01), (0.99, 1.0), (0.4, 0.4)):
        values = {"game.lambda_l": low, "game.lambda_u": high}
        shown = curves.h_bands(run._replace(config={**run.config, **values}))
        page = tmp_path / "page.html"
        page.write_text(pages.document("", pages.section("", [shown])))
        (figure,) = browser.look(page, 390)["figures"]
        assert {f"lambda_l {low:g}", f"lambda_u {high:g}"} <= set(figure["texts"])
        assert figure["clashes"] == [] and figure["outside"] == []


def test_a_run_that_has_only_begun_says_so(reported, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(reported / "config.json", workdir)
    seen = browser.look(run_page.write(workdir))
    assert_sound(seen, 1280)
    assert seen["figures"] == []
    for said in ("not finished, 0 of 20 steps", "No step has been", "not recorded"):
        assert said in seen["text"]


def test_a_report_needs_a_run_and_matplotlib(reported, tmp_path, monkeypatch):
    refused = runs.main("--mode=report", f"--workdir={tmp_path}")
    runs.assert_refused(refused, tmp_path / "config.json")
    assert list(tmp_path.iterdir()) == []
    runs.assert_refused(runs.main("--mode=report"), "--workdir")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert run_page.attempt(reported).startswith("WARNING: no report: a report needs")


def test_tensorboard_that_is_missing_is_one_line(job, tmp_path):
    (tmp_path / "tensorboardX.py").write_text("raise ImportError('not here')")
    arguments = job.arguments(
        f"--workdir={tmp_path / 'run'}", "--config.log.tensorboard"
    )
    done = runs.run(runs.command(*arguments), env={"PYTHONPATH": str(tmp_path)})
    runs.assert_refused(done, "pip install tensorboardX")
    assert not (tmp_path / "run").exists()


def test_quiet_shows_the_table_alone(job, tmp_path):
    done = runs.main(
        *job.arguments(
            f"--workdir={tmp_path / 'run'}",
            "--quiet",
            "--config.teacher.expected_top1=0",
        )
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert "no real image used" in lines[0]
    assert max(map(len, lines)) <= 80
