"""The command that compares arms."""

import csv

from tests import jobs, runs


def compare(job, workdir, *others):
    keep = [a for a in job.arguments() if "eval.data_dir" in a or "dataset" in a]
    common = {
        "teacher.path": job.p_file,
        "teacher.model": "tiny",
        "teacher.image_shape": str(jobs.SHAPE).replace(" ", ""),
        "game.generator_channels": jobs.CHANNELS,
        "game.steps": 8,
        "game.observe_steps": 2,
        "game.warmup_steps": 2,
        "eval.between": 1,
        **{a.split("=")[0].removeprefix("--config."): a.split("=")[1] for a in keep},
    }
    settings = " ".join(f"{key}={value}" for key, value in common.items())
    return runs.main(
        f"--config={jobs.CONFIG}",
        f"--workdir={workdir}",
        f"--set={settings}",
        "--bits=w4a4,w3a3",
        "--arm=base",
        "--arm=later: game.warmup_steps=4",
        *others,
        module=runs.ABLATE,
    )


def test_the_command_compares_goes_on_and_refuses(job, tmp_path):
    done = compare(job, tmp_path / "grid", "--half=second")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "grid" / "table.md").read_text()
    assert table in done.stdout
    assert [line.split(" | ")[1] for line in table.splitlines()[2:]] == [
        "base",
        "later",
    ] * 2
    lines = list(csv.DictReader((tmp_path / "grid" / "runs.csv").open()))
    assert len(lines) == 2 * 2 * 3  # before, between and the last
    # 64 images, of which the second half is measured.
    assert all(float(line["q_top1"]) * 0.32 % 1 < 1e-9 for line in lines)
    assert (tmp_path / "grid" / "plot.png").read_bytes()[1:4] == b"PNG"

    fewer = ["--half=second", "--bits=w3a3"]
    more = compare(job, tmp_path / "grid", *fewer, "--seeds=0,1")
    assert more.returncode == 0, more.stderr
    assert more.stdout.count("step 8/8") == 2  # the others are not played again
    rows = (tmp_path / "grid" / "table.md").read_text().splitlines()[2:]
    assert all(row.split(" | ")[2] == "2" for row in rows)

    # A run whose numbers fail is a line of the table, and not played again.
    for _ in range(2):
        wild = [tmp_path / "grid", *fewer, "--arm=wild: game.q_rate=1e38"]
        done = compare(job, *wild)
        assert done.returncode == 0, done.stderr
        table = (tmp_path / "grid" / "table.md").read_text()
        assert "- w3a3/wild/seed-0 failed: step " in table and "| wild |" not in table
        assert "| W3A3 | later | 1 |" in table

    runs.assert_refused(compare(job, tmp_path / "no", "--arm=base"), "base", "twice")
    runs.assert_refused(compare(job, tmp_path / "no", "--seeds=a"), "--seeds")
    late = compare(job, tmp_path / "no", "--arm=late: game.warmup_steps=50")
    runs.assert_refused(late, "'late'", "config.game.steps=8")
    assert not (tmp_path / "no").exists()
