"""--mode=compare: runs made by hand, whose numbers are known."""

import json
import types

import pytest
from etils import epath

from adadfq_jax import config as base
from adadfq_jax import main
from adadfq_jax.errors import InputError
from adadfq_jax.report import compare, gather
from tests import browser, runs
from tests.memory_path import SCHEME
from tests.test_report import assert_sound, names


def write_run(folder, tops=(80.0, 84.0, 85.0), finished=True, **settings):
    """A run's folder with evaluations at steps 100, 150 and 200."""
    config = base.default_config()
    common = {"game.steps": 200, "game.observe_steps": 50, "game.warmup_steps": 100}
    config.update_from_flattened_dict({**common, **settings})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=list))
    log = [{"step": step, "generator": 1.0} for step in (50, 100, 150, 200)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in log))
    evaluations = zip((100, 150, 200), tops, strict=True)
    summary = {
        "steps": 200,
        "p_top1": 90.0,
        "evaluations": [{"step": s, "q_top1": t} for s, t in evaluations],
        "seconds": 1,
        "device": "1 x cpu",
    }
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [
        write_run(tmp_path / "a" / "0"),
        write_run(tmp_path / "a" / "1", (80.0, 87.0, 86.0), seed=1),
        write_run(tmp_path / "b" / "0", (70.0, 75.0, 76.0), **{"quant.act_bits": 3}),
        write_run(tmp_path / "a" / "2", finished=False, seed=2),
    ]


def test_means_and_deviations_are_over_the_seeds_of_finished_runs(folders):
    labels = compare.labels(folders)
    assert labels == ["a/0", "a/1", "b/0", "a/2"]
    entries = [
        compare.make_entry(label, gather.read(folder))
        for label, folder in zip(labels, folders, strict=True)
    ]
    first, second = compare.make_groups(entries)
    assert [entry.label for entry in first.entries] == ["a/0", "a/1", "a/2"]
    assert [entry.label for entry in first.finished] == ["a/0", "a/1"]
    assert (first.mean("last"), first.mean("best")) == (85.5, 86.0)
    assert first.std == pytest.approx(0.5**0.5)
    assert first.mean("recovered") == pytest.approx((0.5 + 0.6) / 2)
    assert second.mean("last") == 76.0 and second.std != second.std
    assert compare.differing([entry.run for entry in entries]) == {
        "quant.act_bits": ["4", "4", "3", "4"],
        "seed": ["0", "1", "0", "2"],
    }


def test_paths_do_not_make_other_groups(tmp_path):
    folders = [
        write_run(tmp_path / "a", **{"teacher.path": "here"}),
        write_run(tmp_path / "b", **{"teacher.path": "there", "log.every": 7}),
        write_run(tmp_path / "c", **{"game.beta": 2.0}),
    ]
    entries = [compare.make_entry(f.name, gather.read(f)) for f in folders]
    assert [len(g.entries) for g in compare.make_groups(entries)] == [2, 1]


def test_the_command_prints_a_table_and_writes_a_page(folders, tmp_path):
    page = tmp_path / "page.html"
    done = runs.main("--mode=compare", f"--out={page}", *folders)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = [line for line in lines if not line.startswith("page: ")]
    assert max(map(len, table)) <= 80
    (line,) = (line for line in lines if line.split()[:1] == ["a/1"])
    assert line.split()[1:] == [
        *("W4A4", "1", "200", "90.00", "80.00", "86.00", "87.00", "0.60")
    ]
    assert "config.quant.act_bits: 4, 4, 3, 4" in lines
    for width, dark in ((1280, False), (390, True)):
        seen = browser.look(page, width, dark)
        assert_sound(seen, width)
        assert names(seen) == {"curves", "lasts"}
    assert "Not finished (…): a/2." in seen["text"]


def test_what_cannot_be_compared_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match="two folders"):
        compare.labels(folders[:1])
    with pytest.raises(InputError, match="given twice"):
        compare.labels([folders[0], folders[0]])
    page = tmp_path / "page.html"
    done = runs.main("--mode=compare", f"--out={page}", folders[0], tmp_path / "no")
    runs.assert_refused(done, tmp_path / "no" / "config.json")
    assert not page.exists()
    runs.assert_refused(runs.main("--mode=report", folders[0]), folders[0], "--")
    nowhere = tmp_path / "nowhere" / "page.html"
    done = runs.main("--mode=compare", f"--out={nowhere}", *folders)
    runs.assert_refused(done, nowhere)


def test_remote_runs_have_their_own_names():
    assert compare.labels(["gs://b/runs/w4a4/", "gs://b/runs/w3a3"]) == ["w4a4", "w3a3"]
    assert compare.labels(["gs://b/x/run", "gs://c/run"]) == ["b/x/run", "c/run"]
    mixed = ["gs://b/run", "s3://b/run", "/tmp/run"]
    assert compare.labels(mixed) == mixed
    with pytest.raises(InputError, match="gs://b/run: given twice"):
        compare.labels(["gs://b/run", "gs://b//run/"])


def test_remote_runs_are_compared_by_the_names_that_were_given(
    folders, tmp_path, monkeypatch, capsys
):
    page = tmp_path / "page.html"
    monkeypatch.setattr(main, "_OUT", types.SimpleNamespace(value=str(page)))
    names = [f"{SCHEME}bucket/{name}" for name in ("one", "two")]
    for name, local in zip(names, folders, strict=False):
        for file in local.iterdir():
            (epath.Path(name) / file.name).write_bytes(file.read_bytes())
    main._compare(names)
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if "90.00" in line] == [
        "one",
        "two",
    ]
    assert '<th scope="col">one</th>' in page.read_text()
    with pytest.raises(InputError, match=f"{names[0]}: given twice"):
        main._compare([names[0], names[0]])


@pytest.mark.parametrize(("count", "bits"), [(10, 0), (10, 8), (16, 0)])
def test_a_legend_never_takes_the_plot_of_many_groups(tmp_path, count, bits):
    folders = [
        write_run(
            tmp_path / str(i),
            **{"game.beta": 1.0 + i, "quant.first_last_bits": bits},
        )
        for i in range(count)
    ]
    compare.write(folders, tmp_path / "page.html")
    seen = browser.look(tmp_path / "page.html", 390)
    assert_sound(seen, 390)
    (figure,) = (f for f in seen["figures"] if f["id"] == "curves")
    named = [text for text in figure["texts"] if "W4A4" in text]
    assert len(named) == (count if count <= 10 else 0)
    assert ("Where they ended" in figure["caption"]) == (count > 10)
    ticks = [text for text in figure["texts"] if text.isdigit() and int(text) < 100]
    assert len(ticks) >= 4, figure["texts"]


def test_runs_without_evaluation_compare_by_their_keys(tmp_path):
    folders = [
        write_run(tmp_path / name, finished=False, seed=seed)
        for seed, name in enumerate("ab")
    ]
    said = compare.write(folders, tmp_path / "page.html")
    assert "config.seed: 0, 1" in said
    assert "No run was measured." in (tmp_path / "page.html").read_text()
