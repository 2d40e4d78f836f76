"""--mode=compare: runs made by hand, whose numbers are known."""

import math
import types

import pytest
from etils import epath

from adadfq_jax import main
from adadfq_jax.errors import InputError
from adadfq_jax.report import compare, gather
from tests.made_runs import write_four, write_run
from tests.memory_path import SCHEME


@pytest.fixture
def folders(tmp_path):
    return write_four(tmp_path)


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
    assert (first.spread("last").mean, first.spread("best").mean) == (85.5, 86.0)
    assert first.spread("last").std == pytest.approx(0.5**0.5)
    assert first.spread("recovered").mean == pytest.approx((0.5 + 0.6) / 2)
    assert second.spread("last").mean == 76.0
    assert math.isnan(second.spread("last").std)
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


def test_a_run_of_an_earlier_version_has_the_defaults_of_later_keys(folders):
    runs = [gather.read(folder) for folder in folders]
    for run in runs[1:]:
        run.config.pop("game.generator_channels", None)
    runs[0].config["game.generator_channels"] = 128
    assert "game.generator_channels" not in compare.differing(runs)
    runs[0].config["game.generator_channels"] = 64
    values = ["64", "128", "128", "128"]
    assert compare.differing(runs)["game.generator_channels"] == values


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


def test_runs_without_evaluation_compare_by_their_keys(tmp_path):
    folders = [
        write_run(tmp_path / name, finished=False, seed=seed)
        for seed, name in enumerate("ab")
    ]
    said = compare.write(folders, tmp_path / "page.html")
    assert "config.seed: 0, 1" in said
    assert "No run was measured." in (tmp_path / "page.html").read_text()
