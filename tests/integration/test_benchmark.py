"""The benchmark on the smallest network: what it reports, and that outputs agree."""

import json
import sys

import pytest

from tests import jobs, runs

BENCHMARK = [sys.executable, "-m", "adadfq_jax.benchmark"]


def test_table_and_json_without_a_file_of_p(tmp_path):
    config_file = jobs.write_benchmark_config(tmp_path)
    written = tmp_path / "figures.json"
    # In a process of its own: it changes the allocator and the compilation cache.
    done = runs.run(
        [
            *(*BENCHMARK, f"--config={config_file}", f"--json={written}"),
            *("--rounds=2", "--images=8", "--nostart_up", "--devices=2"),
        ]
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(written.read_text())["configs"].values()
    assert found["phases"].keys() == {"observe", "g_only", "both"}
    for row in found["phases"].values():
        assert row["agreement"]["agree"]
        ratio = row["ours_steps_per_second"] / row["reference_steps_per_second"]
        assert row["against_reference"] == pytest.approx(ratio)
    assert found["evaluation_images_per_second"] > 0
    assert found["devices"]["2"]["step"] > 0
    assert 0 < found["flops"]["ours"] < found["flops"]["reference"]
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("both" in line for line in lines)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--config=nowhere.py", "nowhere.py: no such file"),
        ("--batch=0", "--batch=0: numbers from 1 up"),
    ],
)
def test_refusals_are_one_line(flag, sentence):
    runs.assert_refused(runs.run([*BENCHMARK, flag]), sentence)
