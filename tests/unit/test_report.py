"""The report of a run: recorded on the way, written at its end."""

import json
import math
import shutil
import struct

import jax
import numpy as np
import pytest

from adadfq_jax.jobs import train
from adadfq_jax.report import (
    drawing,
    gather,
    pictures,
    record,
    run_page,
    snapshot,
)
from adadfq_jax.runtime import sharding
from adadfq_jax.training import workdir as folder
from tests.jobs import RECORDING, rows, tiny_config


def test_what_is_recorded(reported):
    shots = gather.read(reported).snapshots
    assert [shot.step for shot in shots] == [4, 9, 14, 20]
    summary = json.loads((reported / "summary.json").read_text())
    tops = [entry["q_top1"] for entry in summary["evaluations"]]
    assert [shot.q_top1 for shot in shots[:3]] == pytest.approx(tops[:3])
    for shot in shots:
        assert shot.h.shape == (256,) and -1e-6 < shot.h.min() < shot.h.max() <= 1
        assert shot.real.labels.tolist() == [i % 10 for i in range(64)]
        assert shot.kernels.names.tolist() == ["init_block.conv", "unit.conv", "output"]
        assert shot.activations.names.tolist() == ["init_quant", "unit_quant"]
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

    def recorded(self, state, *others):
        before = sharding.fetch(state)
        real(self, state, *others)
        jax.tree.map(np.testing.assert_array_equal, before, sharding.fetch(state))
        played.append(int(state.step))

    monkeypatch.setattr(record.Recorder, "record", recorded)
    with_it, without = tmp_path / "with", tmp_path / "without"
    train.run(tiny_config(job, **RECORDING), with_it)
    train.run(tiny_config(job, **{**RECORDING, "report.enabled": False}), without)
    # Steps 4, 9, 14 and 20 at the first pauses that reach them.
    assert played == [4, 10, 14, 20]
    assert [r["step"] for r in rows(with_it)] == [r["step"] for r in rows(without)]
    name = "quantized.safetensors"
    assert (with_it / name).read_bytes() == (without / name).read_bytes()


def test_noise_is_in_decibels():
    x = np.array([0.0, 1.0, 2.0, 3.0])
    layers = record._layers([("one", x, x + 0.1, np.zeros(1), np.full(1, 2.0))])
    assert layers.sqnr[0] == pytest.approx(10 * math.log10(14 / 0.04), rel=1e-5)
    edges = np.linspace(*snapshot.SPAN, snapshot.BINS + 1)
    bins = np.searchsorted(edges, [0, 0.5, 1, 1.25 - 1e-6], "right") - 1
    assert np.flatnonzero(layers.histogram[0]).tolist() == bins.tolist()


def test_labels_fill_whole_batches_with_enough_of_the_shown_classes():
    for classes, batch in ((10, 16), (100, 16), (1000, 200), (3, 7)):
        labels = record.labels_to_draw(classes, batch)
        assert len(labels) % batch == 0 and len(labels) >= record.GENERATED
        counts = np.bincount(labels, minlength=classes)
        assert counts[record.classes_shown(classes)].min() >= record.EACH_SHOWN


def test_damaged_files_are_left_out_with_a_sentence(reported, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reported, workdir)
    snapshot.path_of(workdir, 9).write_bytes(b"PK no")
    with (workdir / "metrics.jsonl").open("a") as log:
        log.write('{"step": 2')
    run = gather.read(workdir)
    assert [shot.step for shot in run.snapshots] == [4, 14, 20]
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
        damaged += len(gather._read_snapshots(workdir, notes)) == 3
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


def test_figures_keep_their_names_to_themselves():
    svg = (
        '<?xml?><svg id="a"><defs><style>*{}</style><path id="m1"/></defs>'
        '<use xlink:href="#m1" style="fill: #0072b2"/></svg>'
    )
    found = drawing.to_inline(svg, "x")
    assert 'id="x-m1"' in found and 'href="#x-m1"' in found and "var(--blue)" in found
    assert "style>" not in found and 'id="a"' not in found


def test_large_images_are_thinned_out():
    strip = pictures._thin(np.zeros((2, 224, 224, 3), np.uint8))
    assert strip.shape == (2, 56, 56, 3)


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
        for name in ("generator", "student", "h_mean"):
            assert found[row["step"], name] == pytest.approx(row[name], rel=1e-5)
    summary = json.loads((reported / "summary.json").read_text())
    assert found[20, "q_top1"] == pytest.approx(summary["q_last_top1"])
