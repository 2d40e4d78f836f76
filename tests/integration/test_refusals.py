"""Bad input: one line that names it, exit code 2, and nothing left behind."""

import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from adadfq_jax import teacher
from tests import helpers, jobs, runs
from tests.bad_files import write_malicious, write_truncated
from tests.runs import assert_same_result, start, wait_for

CIFAR10 = f"--config={jobs.CONFIG}"


def refuse(tmp_path, arguments, *named, **kwargs):
    """Runs with the workdir tmp_path/run; nothing may come of it."""
    before = jobs.tree(tmp_path)
    done = runs.main(*arguments, f"--workdir={tmp_path / 'run'}", **kwargs)
    runs.assert_refused(done, *named)
    assert jobs.tree(tmp_path) == before
    return done


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--config is needed"),
        (["--config=configs/none.py"], "none.py"),
        (["--config=tests"], "tests"),
        ([f"{CIFAR10}:w44"], "w44"),
        ([f"{CIFAR10}:w4a9"], "w4a9"),
        ([CIFAR10, "--config.quant.act_bits=9"], "config.quant.act_bits=9"),
        ([CIFAR10, "--config.quant.weight_bits=1"], "config.quant.weight_bits=1"),
        ([CIFAR10, "--config.game.lambda_x=1"], "config.game.lambda_l"),
        ([CIFAR10, "--config.game.steps=many"], "game.steps"),
        ([CIFAR10, "--nope=1"], "nope"),
        ([CIFAR10, "more"], "more"),
        (
            [CIFAR10, "--mode=nope"],
            "train|evaluate|export|sample|sensitivity|inspect|report|compare",
        ),
        ([CIFAR10], "config.teacher.path=''"),
        ([CIFAR10, "--config.teacher.model=resnet21"], "resnet21"),
    ],
)
def test_the_command_line(tmp_path, arguments, named):
    refuse(tmp_path, arguments, named)


def test_the_workdir_is_needed():
    runs.assert_refused(runs.main_apart(CIFAR10), "--workdir")


def write_not_finite(path):
    variables = helpers.filled_tree("resnet20_cifar10")
    state_dict = teacher.to_state_dict(variables)
    state_dict["output.bias"] = np.full(10, np.nan, np.float32)
    teacher.save(path, teacher.from_state_dict(state_dict, "resnet20"), {})


FILES = {
    "missing": (lambda path: None, ["no such file", "config.teacher.path"]),
    "empty": (lambda path: path.write_bytes(b""), ["empty"]),
    "truncated": (write_truncated, ["not a PyTorch checkpoint"]),
    "a text": (lambda path: path.write_text("hello there"), ["not a PyTorch"]),
    "malicious": (write_malicious, ["no tensors in it", "mkdir"]),
    "not finite": (write_not_finite, ["output", "not finite"]),
    "another network": (
        lambda path: shutil.copy(helpers.GOLDEN / "he_resnet20_legacy.th", path),
        ["missing 10", "layer2.0.shortcut.0.weight", "config.teacher.model=resnet20a"],
    ),
}


@pytest.mark.parametrize(("write", "named"), FILES.values(), ids=FILES)
def test_the_file_of_p(tmp_path, write, named):
    path = tmp_path / "p.pth"
    write(path)
    refuse(tmp_path, [CIFAR10, f"--config.teacher.path={path}"], path, *named)
    assert not (tmp_path / "executed").exists()


def test_evaluation_data_that_is_not_there(job, tmp_path):
    arguments = job.arguments(
        "--config.eval.dataset=cifar10", f"--config.eval.data_dir={tmp_path}"
    )
    refuse(tmp_path, arguments, "cifar10", "python -c", "config.eval.enabled=False")


def test_evaluation_data_of_another_shape(job, tmp_path):
    arguments = [
        argument.replace("(16, 16, 3)", "(20, 20, 3)") for argument in job.arguments()
    ]
    refuse(tmp_path, arguments, "small_set", "(16, 16, 3)", "(20, 20, 3)")


def test_a_kernel_to_keep_in_float_that_is_not_there(job, tmp_path):
    arguments = job.arguments("--config.export.float_layers=nothing")
    refuse(tmp_path, arguments, "config.export.float_layers=nothing", "no such kernel")


def test_a_batch_that_does_not_divide_over_the_devices(job, tmp_path):
    ways_out = (
        "config.devices=2",
        "config.game.batch_size=18",
        "config.game.batch_rule=per_device",
    )
    refuse(tmp_path, job.arguments(), "batch_size=16", *ways_out, devices=3)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--config.game.lambda_l=0.2", "game.lambda_l is 0.1 there and 0.2 here"),
        ("--config.seed=1", "seed is 0"),
        ("--config.quant.act_bits=5", "quant.act_bits"),
        ("--config.game.batch_rule=per_device", "game.batch_size is 16"),
        ("--config.game.steps=10", "has played 20 steps"),
    ],
)
def test_a_workdir_of_another_game(job, finished, override, named):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    arguments = job.arguments(f"--workdir={finished}", override)
    runs.assert_refused(runs.main(*arguments, devices=2), finished, named)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_a_workdir_of_another_p_by_its_content(job, finished, tmp_path):
    moved = tmp_path / "renamed.safetensors"
    shutil.copy(job.p_file, moved)
    same = job.arguments(f"--workdir={finished}", f"--config.teacher.path={moved}")
    assert runs.main(*same).returncode == 0

    variables = teacher.load(moved, "tiny")
    variables["params"]["output"]["bias"][0] += 1
    teacher.save(moved, variables, {})
    runs.assert_refused(runs.main(*same), finished, "teacher.sha256")


def test_a_workdir_with_files_of_unknown_origin(job, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "quantized.safetensors").write_text("precious")
    refuse(tmp_path, job.arguments(), tmp_path / "run", "quantized.safetensors")


@pytest.mark.parametrize("workdir", ["/dev/null/run", "{p_file}"])
def test_a_workdir_that_cannot_be_one(job, workdir):
    workdir = workdir.format(p_file=job.p_file)
    done = runs.main(*job.arguments(f"--workdir={workdir}"))
    runs.assert_refused(done, workdir)
    assert job.p_file.is_file()


def test_a_workdir_that_is_in_use(job, tmp_path):
    arguments = job.arguments(f"--workdir={tmp_path}/run", "--config.game.steps=9000")
    process = start(arguments)
    try:
        wait_for(process, "step 5/9000")
        runs.assert_refused(runs.main(*arguments), tmp_path / "run", "another run")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_workdir_that_vanishes_during_the_run(job, tmp_path):
    """By its removal, which stops the superuser too; it does not come back."""
    workdir = tmp_path / "run"
    process = start(job.arguments(f"--workdir={workdir}", "--config.game.steps=9000"))
    wait_for(process, "step 5/9000")
    # A save in progress can make the removal fail half-way.
    end = time.monotonic() + 60
    while workdir.exists() and time.monotonic() < end:
        shutil.rmtree(workdir, ignore_errors=True)
    out, err = process.communicate(timeout=300)
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    runs.assert_refused(done, workdir)
    assert not workdir.exists()


def in_mounted(folder, options, commands):
    """Runs shell commands beside a file system that only they see."""
    script = f"mount -t tmpfs -o {options} tmpfs {folder}\n{commands}"
    return runs.run(["unshare", "--mount", "--map-root-user", "sh", "-c", script])


def shell(arguments):
    return subprocess.list2cmdline(runs.command(*arguments))


@pytest.fixture
def mount(tmp_path):
    folder = tmp_path / "mount"
    folder.mkdir()
    tried = in_mounted(folder, "size=1m", "true")
    assert tried.returncode == 0, f"needs unshare and mount: {tried.stderr}"
    return folder


def test_a_read_only_disk(job, mount):
    arguments = job.arguments(f"--workdir={mount}/run")
    done = in_mounted(mount, "ro", shell(arguments))
    runs.assert_refused(done, mount / "run", "Read-only file system")


def test_a_disk_that_is_full_from_the_start(job, mount):
    fill = f"head -c 1M /dev/zero > {mount}/filler 2> {mount.parent}/full"
    arguments = job.arguments(f"--workdir={mount}/run")
    done = in_mounted(
        mount, "size=1m", f"{fill}; {shell(arguments)}; code=$?; ls {mount}; exit $code"
    )
    runs.assert_refused(done, mount / "run", "No space left on device")
    assert done.stdout.split() == ["filler"]


def test_a_disk_that_fills_up_and_is_then_made_larger(job, finished, mount):
    """What was saved stays, and the same command goes on from there."""
    play = shell(job.arguments(f"--workdir={mount}/run", "--config.checkpoint.every=2"))
    kept = mount.parent / "kept"
    done = in_mounted(
        mount,
        "size=700k",  # two checkpoints and a half
        f"""{play}; code=$?; ls {mount}/run/checkpoints > {mount.parent}/listed
        mount -o remount,size=200m {mount}; {play} >&2 && cp -r {mount}/run {kept}
        exit $code""",
    )
    assert kept.exists(), done.stderr
    listed = (mount.parent / "listed").read_text().split()
    assert listed and all(name.isdecimal() for name in listed)
    first = next(i for i in done.stderr.splitlines() if i.startswith("error: "))
    runs.assert_refused(done, mount / "run", "make room")
    assert "checkpoint of step" in first
    assert "resuming at step" in done.stderr
    assert_same_result(kept, finished)
