"""The report of a run: recorded on the way, written at its end, seen in a browser."""

import json
import shutil
import signal
import struct

import jax
import numpy as np
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
from adadfq_jax.runtime import sharding
from adadfq_jax.training import workdir as folder
from tests import browser, jobs, runs
from tests.jobs import RECORDING, measured, rows, tiny_config
from tests.pages import assert_sound, names
from tests.runs import start, wait_for

ALWAYS = {
    *("h-bands", "h-histogram", "p-agrees", "loss-generator", "loss-student"),
    *("loss-margin", "loss-bn_stats", "images", "confusion-generated", "sizes"),
    *("kernel-noise", "activation-noise", "kernel-ranges", "activation-ranges"),
    *("rates", "speed"),
}
WITH_EVALUATION = {"accuracy", "confusion-real", "real-activation-ranges"}
RECONSTRUCTED = {"block-errors", "loss-error", "loss-penalty"}


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_every_figure_is_rendered(reported, width, dark):
    seen = browser.look(reported / "report" / "index.html", width, dark)
    assert_sound(seen, width)
    assert names(seen) >= ALWAYS | WITH_EVALUATION | RECONSTRUCTED
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


ONE_FIGURE = pages._templates().from_string(
    '{% extends "page.html" %}{% from "parts.html" import section %}'
    '{% block body %}{{ section("", figures) }}{% endblock %}'
)


def test_close_boundaries_have_legible_names(reported, tmp_path):
    run = gather.read(reported)
    for low, high in ((0.5, 0.53), (0.0, 0.01), (0.99, 1.0), (0.4, 0.4)):
        values = {"game.lambda_l": low, "game.lambda_u": high}
        shown = curves.h_bands(run._replace(config={**run.config, **values}))
        page = tmp_path / "page.html"
        page.write_text(ONE_FIGURE.render(title="", figures=[shown]))
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
    runs.assert_refused(done, "pip install 'adadfq_jax[tensorboard]'")
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
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1] == str(tmp_path / "run" / "quantized.safetensors")


def test_what_is_recorded(reported):
    shots = gather.read(reported).snapshots
    assert [shot.step for shot in shots] == [4, 9, 14, 20, 38]
    summary = json.loads((reported / "summary.json").read_text())
    tops = [entry["q_top1"] for entry in summary["evaluations"]]
    assert [shot.q_top1 for shot in shots] == pytest.approx(tops)
    for shot in shots:
        assert shot.h.shape == (256,) and -1e-6 < shot.h.min() < shot.h.max() <= 1
        assert shot.real.labels.tolist() == [i % 10 for i in range(64)]
        assert shot.kernels.names.tolist() == ["init_block.conv", "unit.conv", "output"]
        assert shot.activations.names.tolist() == [
            "unit.conv.kernel:input",
            "output.kernel:input",
        ]
        assert (shot.activations.sqnr > 5).all()
        np.testing.assert_allclose(shot.activations.histogram.sum(1), 1, rtol=1e-5)
        labels = shot.generated.labels[shot.generated.shown]
        assert min(np.bincount(labels)) >= record.EACH_SHOWN
    right = np.mean(shots[0].real.q == shots[0].real.labels)
    assert 100 * right == pytest.approx(tops[0], abs=2)


def test_recording_fetches_at_pauses_only_and_leaves_the_game(
    job, tmp_path, monkeypatch
):
    played = []
    real = record.Recorder.record

    def recorded(self, step, state, *others):
        before = sharding.fetch(state)
        real(self, step, state, *others)
        jax.tree.map(np.testing.assert_array_equal, before, sharding.fetch(state))
        played.append(step)

    monkeypatch.setattr(record.Recorder, "record", recorded)
    with_it, without = tmp_path / "with", tmp_path / "without"
    train.run(tiny_config(job, **RECORDING), with_it)
    train.run(tiny_config(job, **{**RECORDING, "report.enabled": False}), without)
    # Steps 4, 9, 14 and 20 at the first pauses that reach them.
    assert played == [4, 10, 14, 20]
    assert [r["step"] for r in rows(with_it)] == [r["step"] for r in rows(without)]
    name = "quantized.safetensors"
    assert (with_it / name).read_bytes() == (without / name).read_bytes()


def test_damaged_files_are_left_out_with_a_sentence(reported, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reported, workdir)
    snapshot.path_of(workdir, 9).write_bytes(b"PK no")
    with (workdir / "metrics.jsonl").open("a") as log:
        log.write('{"step": 2')
    run = gather.read(workdir)
    assert [shot.step for shot in run.snapshots] == [4, 14, 20, 38]
    assert len(run.notes) == 2
    page = run_page.render(run)
    assert "The recording of step 9 is damaged" in page


def test_no_flipped_byte_of_a_recording_ends_in_an_error(reported, tmp_path):
    """One of the packed data is an error of zlib, of the directory one of zipfile."""
    workdir = tmp_path / "run"
    shutil.copytree(reported, workdir)
    path = snapshot.path_of(workdir, 9)
    content, damaged = path.read_bytes(), 0
    places = np.linspace(0, len(content) - 1, 150).astype(int)
    for place in [*places, *range(len(content) - 60, len(content))]:
        changed = bytearray(content)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        notes = []
        damaged += len(gather._read_snapshots(workdir, notes)) == 4
        assert len(notes) <= 1
    assert damaged > 100


def test_a_run_is_whole_without_its_report(reported, monkeypatch):
    def fail(run):
        raise RuntimeError("not thought of\nat all")

    monkeypatch.setattr(run_page, "render", fail)
    said = run_page.attempt(reported)
    assert said == "WARNING: no report: RuntimeError: not thought of at all"


def test_a_failed_run_says_so_in_its_headline(reported, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reported, workdir)
    (workdir / "summary.json").unlink()
    folder.leave_failure(workdir, "step 7: not finite: generator")
    run = gather.read(workdir, "mine")
    assert run.name == "mine"
    said = run_page.headline(run)
    assert said.endswith("its numbers failed, step 7: not finite: generator")
    assert said in run_page.render(run)


def test_what_comes_from_files_is_escaped(reported):
    run = gather.read(reported)
    evil = "<script>alert(1)</script>"
    run = run._replace(
        name=evil,
        command=evil,
        config={**run.config, "eval.dataset": evil, "recipe": evil, evil: evil},
        rows=[{**row, evil: 1.0} for row in run.rows],
    )
    assert "<script" not in run_page.render(run)


def events(folder):
    """(step, name, value) of event files."""
    from tensorboardX.proto import event_pb2

    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                yield event.step, value.tag, value.simple_value
            content = content[16 + length :]


def test_tensorboard_has_the_numbers_of_the_log(reported):
    found = {
        (step, name): value for step, name, value in events(reported / "tensorboard")
    }
    for row in rows(reported):
        rebuilt = row["phase"] == "reconstruct"
        for name in ("error",) if rebuilt else ("generator", "student", "h_mean"):
            assert found[row["step"], name] == pytest.approx(row[name], rel=1e-5)
    summary = json.loads((reported / "summary.json").read_text())
    assert found[38, "q_top1"] == pytest.approx(summary["q_last_top1"])
