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


# The benchmark of a device, in which the package may import nothing but these. `absl`
# comes with ml_collections, `ml_dtypes` with jax.
GUARDED = """
import builtins, runpy, sys
allowed = {"adadfq_jax", "absl", "flax", "jax", "ml_collections", "ml_dtypes", "numpy"}
allowed |= {"optax", *sys.stdlib_module_names}
imports = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    ours = str((globals or {}).get("__package__")).startswith("adadfq_jax")
    if ours and not level and name.partition(".")[0] not in allowed:
        raise ModuleNotFoundError(f"{globals['__name__']} imports {name}")
    return imports(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
runpy.run_module("adadfq_jax.benchmark", run_name="__main__", alter_sys=True)
"""


def test_a_device_is_measured_with_few_packages_and_within_a_budget(tmp_path):
    out = tmp_path / "device"
    command = [sys.executable, "-c", GUARDED, "--device", "--quick", f"--out={out}"]
    done = runs.run([*command, "--budget=0.3"])
    assert done.returncode == 0, done.stderr
    cases = ["tiny 4 step float32", "tiny 4 scan bfloat16", "tiny 8 blocks float32"]
    missing = "\n".join(f"- {case}" for case in cases)
    assert f"## Not measured: no time\n\n{missing}\n" in done.stdout

    done = runs.run(command)
    assert done.returncode == 0, done.stderr
    assert "Not measured" not in done.stdout and "Failed" not in done.stdout
    text = (out / "device.md").read_text()
    assert text in done.stdout
    found = json.loads((out / "device.json").read_text())
    step, scan, blocks = (found["cases"][case] for case in cases)
    for row in (step, scan):
        assert row["images_per_second"] == pytest.approx(4 * row["steps_per_second"])
        assert row["compile_seconds"] > 0 and row["program_bytes"] > 0
        # A step of both players has more than 200 Mflop for 4 images.
        flops = row["flops_per_second"] / row["steps_per_second"]
        assert 2e8 < flops < 4e8
    assert 0 < scan["logits_off"] < 0.02 and scan["top1_agrees"] > 0.5
    assert abs(scan["losses"]["generator"] / step["losses"]["generator"] - 1) < 0.1
    operations = step["profile"]["operations"]
    assert step["profile"]["busy"] > 0 and 0.2 < sum(operations.values()) <= 1
    assert len(blocks["blocks"]) == 3
    assert all(block["after"] < block["before"] for block in blocks["blocks"])
    for case in cases:
        assert f"\n| {case} " in text


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--config=nowhere.py", "nowhere.py: no such file"),
        ("--batch=0", "--batch=0: numbers from 1 up"),
        ("--quick", "--quick: only with --device"),
        ("--device --rounds=2", "--rounds: only without --device"),
    ],
)
def test_refusals_are_one_line(flag, sentence):
    runs.assert_refused(runs.run([*BENCHMARK, *flag.split()]), sentence)
