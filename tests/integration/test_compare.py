"""--mode=compare: its command and its page in a browser."""

import pytest

from adadfq_jax.errors import InputError
from adadfq_jax.report import compare
from tests import browser, runs
from tests.made_runs import write_four, write_run
from tests.pages import assert_sound, names


@pytest.fixture
def folders(tmp_path):
    return write_four(tmp_path)


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
