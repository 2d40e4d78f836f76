"""The scripts for TPU slices and Slurm, against stubs of gcloud and Slurm."""

import os
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from tests.launch_bench import LAUNCH, STUB, Bench

ODD = ["--config=configs/x.py:w4a4,tpu", "--config.note=it's (48, 48, 3) $HOME; *"]
SETTINGS = ["--name=demo", "--zone=us-west4-a", "--type=v5litepod-16", "--poll=0"]
BUCKET = "--workdir=gs://bucket/run"


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


SETUP = ["git", "scp", "setup"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["tpu.sh", "create", *SETTINGS],
        ["tpu.sh", "create", *SETTINGS, "--spot", "--project=p"],
        ["tpu.sh", "setup", *SETTINGS, f"--file={LAUNCH}/README.md"],
        ["tpu.sh", "run", *SETTINGS, BUCKET, "--", *ODD],
        ["tpu.sh", "stop", *SETTINGS],
        ["tpu.sh", "resume", *SETTINGS, BUCKET, "--spot", "--", *ODD],
        ["tpu.sh", "fetch", *SETTINGS, BUCKET, "--to=a folder"],
        ["tpu.sh", "fetch", *SETTINGS, "--workdir=runs/w4a4"],
        ["tpu.sh", "delete", *SETTINGS],
        ["slurm.sh", "--nodes=2", "--gpus=8", "--", *ODD, "--workdir=/shared/run"],
        ["slurm.sh", "--sbatch=--partition=gpu", "--", *ODD, "--workdir=w"],
    ],
    ids=lambda a: "-".join(a[:2]),
)
def test_a_dry_run_prints_exactly_what_is_executed(bench, arguments):
    split = arguments.index("--") if "--" in arguments else len(arguments)
    dry = bench.run(*arguments[:split], "--dry-run", *arguments[split:])
    assert dry.returncode == 0, dry.stderr
    assert bench.received() == []
    # What a dry run supposes: a slice that was preempted comes back.
    bench.answer("states", *["SUSPENDED"] * (arguments[1] == "resume"), "ACTIVE")
    bench.answer("codes", 0)
    done = bench.run(*arguments)
    assert done.returncode == 0, done.stderr
    executed = bench.received()
    assert executed and executed == [
        shlex.split(line) for line in dry.stdout.splitlines()
    ]


def test_what_is_asked_for_is_a_queued_resource(bench):
    bench.answer("states", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    settings = ["--name=demo", "--zone=us-west4-a", "--spot", "--poll=0"]
    done = bench.run("tpu.sh", "create", *settings, "--type=v5litepod-8")
    assert done.returncode == 0, done.stderr
    asked, *looks = bench.received()
    assert asked == [
        *["gcloud", "compute", "tpus", "queued-resources", "create", "demo"],
        "--zone=us-west4-a",
        "--node-id=demo",
        "--accelerator-type=v5litepod-8",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    ]
    assert len(looks) == 3


def test_settings_come_from_the_environment_too(bench):
    bench.answer("codes", 0)
    env = {"TPU_NAME": "demo", "ZONE": "z", "PROJECT_ID": "p", "WORKDIR": "gs://b/r"}
    done = bench.run("tpu.sh", "run", **env)
    assert done.returncode == 0, done.stderr
    (command,) = bench.received()
    assert {"demo", "--zone=z", "--project=p", "--worker=all"} <= set(command)
    assert "run --distributed --workdir=gs://b/r" in command[-1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tpu.sh"], "create, setup, run"),
        (["tpu.sh", "dance"], "dance"),
        (["tpu.sh", "run", "--zone=z", BUCKET], "--name"),
        (["tpu.sh", "run", "--name=A_b", "--zone=z", BUCKET], "--name=A_b"),
        (["tpu.sh", "run", "--name=a", BUCKET], "--zone"),
        (["tpu.sh", "create", "--name=a", "--zone=z"], "--type"),
        (["tpu.sh", "create", "--name=a", "--zone=z", "--type=v9-8"], "--runtime"),
        (["tpu.sh", "run", *SETTINGS], "--workdir"),
        (["tpu.sh", "run", *SETTINGS, "--workdir=runs/a"], "gs://"),
        (["tpu.sh", "resume", *SETTINGS, "--workdir=/disk/a"], "gs://"),
        (["tpu.sh", "run", *SETTINGS, BUCKET, "--", "--workdir=w"], "before --"),
        (["tpu.sh", "run", *SETTINGS, BUCKET, "--config=x.py"], "after --"),
        (["tpu.sh", "stop", *SETTINGS, "--", "now"], "no arguments"),
        (["tpu.sh", "create", *SETTINGS, "--poll=soon"], "--poll=soon"),
        (["tpu.sh", "create", *SETTINGS, "--type=v5e"], "--type=v5e"),
        (["tpu.sh", "setup", *SETTINGS, "--file=/nowhere/p.pth"], "/nowhere/p.pth"),
        (["slurm.sh", "--gpus=all", "--", "--config=x.py", "--workdir=w"], "all"),
        (["slurm.sh", "--", "--config=x.py", "--config.seed=1"], "--workdir"),
        (["slurm.sh", "--config=x.py"], "after --"),
        (["install.sh"], "cuda13"),
        (["install.sh", "rocm"], "rocm"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(bench, arguments, named):
    done = bench.run(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and named in line
    assert bench.received() == []


@pytest.mark.parametrize(
    ("failing", "executed"), [("archive", 1), ("tpu-vm scp", 2), ("tpu-vm ssh", 3)]
)
def test_a_command_that_fails_is_the_last_and_gives_its_code(bench, failing, executed):
    bench.answer("fails", failing)
    done = bench.run("tpu.sh", "setup", *SETTINGS, f"--file={LAUNCH}/README.md")
    assert done.returncode == 7
    assert bench.steps() == SETUP[:executed]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "-"])
def test_a_request_that_is_not_fulfilled_is_said(bench, state):
    bench.answer("states", "CREATING", state)
    done = bench.run("tpu.sh", "create", *SETTINGS)
    assert done.returncode == 1
    assert f"demo is {state}".replace("-", "ABSENT") in done.stderr


@pytest.mark.parametrize("code", [0, 2, 3, 75, 130])
def test_run_ends_with_the_code_of_the_game(bench, code):
    bench.answer("codes", code)
    assert bench.run("tpu.sh", "run", *SETTINGS, BUCKET).returncode == code


RESUMED = {
    "nothing there": (
        ["-", "CREATING", "ACTIVE"],
        [0],
        ["list", "create", "list", "list", *SETUP, "run"],
    ),
    "already playing": (["ACTIVE"], [0], ["list", "run"]),
    "preempted while playing": (
        ["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "ACTIVE"],
        [134, 0],
        ["list", "run", *["list"] * 3, "delete", "create", "list", *SETUP, "run"],
    ),
    "stopped and saved": (["ACTIVE", "ACTIVE"], [75, 0], ["list", "run"] * 2),
    "the connection broke": (
        ["ACTIVE"] * 3,
        [255, 0],
        ["list", "run", "list", "list", "run"],
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_goes_on_until_the_game_is_done(bench, case):
    states, codes, expected = RESUMED[case]
    bench.answer("states", *states)
    bench.answer("codes", *codes)
    done = bench.run("tpu.sh", "resume", *SETTINGS, BUCKET)
    assert done.returncode == 0, done.stderr
    assert bench.steps() == expected


@pytest.mark.parametrize(
    ("states", "codes", "code"),
    [
        (["ACTIVE"] * 2, [2], 2),
        (["ACTIVE"] * 2, [3], 3),
        (["ACTIVE"] * 12, [255] * 6, 255),
        (["FAILED"], [], 1),
    ],
)
def test_resume_gives_up_where_another_try_would_not_help(bench, states, codes, code):
    bench.answer("states", *states)
    bench.answer("codes", *codes)
    assert bench.run("tpu.sh", "resume", *SETTINGS, BUCKET).returncode == code
    assert (bench.stubs / "codes").read_text() == ""


def test_resume_sets_a_slice_up_again_that_was_preempted_meanwhile(bench):
    bench.answer("states", "-", "ACTIVE", "SUSPENDED", "SUSPENDED", "FAILED")
    bench.answer("fails", "tpu_vm.sh setup")
    assert bench.run("tpu.sh", "resume", *SETTINGS, BUCKET).returncode == 1
    assert bench.steps() == [
        *["list", "create", "list", *SETUP],
        *["list", "list", "delete", "create", "list"],
    ]


def test_resume_gives_up_where_gcloud_itself_fails(bench):
    bench.answer("fails", "queued-resources list")
    assert bench.run("tpu.sh", "resume", *SETTINGS, BUCKET).returncode == 1
    assert set(bench.steps()) == {"list"}


# In place of local.sh: says its arguments; with `wait` among them, waits for SIGTERM.
GAME = """#!/bin/bash
printf '<%s>' "$@"
echo
trap 'echo saved; exit 75' TERM
while [[ "$*" == *wait* ]]; do sleep 0.05; done
exit 3
"""


class Vm:
    """A folder as a VM's home, in which what is meant for ssh is executed."""

    def __init__(self, bench, folder):
        self.bench, self.home = bench, folder / "home"
        launch = self.home / "adadfq_jax" / "launch"
        shutil.copytree(LAUNCH, launch)
        (launch / "local.sh").write_text(GAME)
        (launch / "install.sh").write_text('#!/bin/bash\necho "$PYTHON" "$@"\n')
        self.bin = self.home / "bin"
        self.bin.mkdir()

    def start(self, command, *arguments):
        workdir = [BUCKET] if command == "run" else []
        game = ["--", *arguments] if arguments else []
        dry = self.bench.run("tpu.sh", command, *SETTINGS, *workdir, "--dry-run", *game)
        words = shlex.split(dry.stdout.splitlines()[-1])
        return subprocess.Popen(
            ["bash", "-c", words[-1].removeprefix("--command=")],
            cwd=self.home,
            env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def complete(self, command, *arguments):
        process = self.start(command, *arguments)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said


@pytest.fixture
def vm(bench, tmp_path):
    return Vm(bench, tmp_path)


@pytest.mark.parametrize("old", [True, False])
def test_on_a_vm_setup_unpacks_and_finds_a_python_that_is_new_enough(vm, old):
    with tarfile.open(vm.home / "adadfq_jax.tar.gz", "w:gz") as archive:
        archive.add(vm.home / "adadfq_jax" / "launch", "launch")
    shutil.rmtree(vm.home / "adadfq_jax")
    python = vm.bin / "python3"
    python.write_text(
        "#!/bin/bash\n"
        f"[[ $1 != -c ]] || exit {int(old)}\n"
        '[[ "$*" == *find* ]] && echo /uv/python3.11 || echo "$@" >&2\n'
    )
    python.chmod(0o755)
    installs = "-m pip install --quiet --user uv\n-m uv python install --quiet 3.11\n"
    found = installs + "/uv/python3.11" if old else "python3"
    assert vm.complete("setup") == (0, f"{found} tpu\n")


def test_on_a_vm_the_arguments_arrive_and_the_code_comes_back(vm):
    given = "".join(f"<{a}>" for a in ("--distributed", BUCKET, *ODD))
    assert vm.complete("run", *ODD) == (3, f"{given}\n")
    assert vm.complete("run") == (3, f"<--distributed><{BUCKET}>\n")


def test_on_a_vm_a_broken_connection_leaves_the_game_and_run_follows_it(vm):
    first = vm.start("run", "wait")
    begun = first.stdout.readline()
    assert "<wait>" in begun
    first.kill()
    first.wait(timeout=60)
    second = vm.start("run", "wait")
    assert second.stdout.readline() == begun
    other = (2, "error: another game is going on here; stop ends it\n")
    assert vm.complete("run", "wait", "--config.seed=1") == other
    assert vm.complete("stop") == (0, "")
    said, _ = second.communicate(timeout=60)
    assert (second.returncode, said) == (75, "saved\n")
    assert vm.complete("stop") == (0, "nothing is playing\n")


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130, 137])
def test_slurm_requeues_on_75_and_only_then(bench, code):
    bench.answer("codes", code)
    done = bench.run("slurm.sbatch", *ODD)
    assert done.returncode == code
    played, *others = bench.received()
    main = [".venv/bin/python", "-m", "adadfq_jax.main", "--distributed"]
    assert played == ["srun", "--kill-on-bad-exit=0", *main, *ODD]
    assert others == ([["scontrol", "requeue", "123"]] if code == 75 else [])


def test_slurm_says_where_it_could_not_requeue(bench):
    bench.answer("codes", 75)
    bench.answer("fails", "requeue 123")
    done = bench.run("slurm.sbatch")
    assert done.returncode == 75
    assert "submit it again" in done.stderr


def test_a_cancelled_slurm_job_is_not_requeued(bench):
    """scancel sends SIGTERM to the tasks, which save and end with 75, and to this."""
    (bench.stubs / "srun").write_text(
        '#!/bin/bash\necho > "$(dirname "$0")/begun"\nsleep 1\nexit 75\n'
    )
    job = subprocess.Popen(
        [bench.clone / "launch" / "slurm.sbatch"],
        env=bench.env,
        start_new_session=True,
    )
    while not (bench.stubs / "begun").exists():
        time.sleep(0.02)
    job.terminate()
    assert job.wait(timeout=60) == -signal.SIGTERM
    os.killpg(job.pid, signal.SIGKILL)
    assert bench.received() == []


def test_slurm_signals_the_tasks_before_the_limit_and_may_requeue(bench):
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH ")]
    assert "--requeue" in options and "--open-mode=append" in options
    (signalled,) = [o for o in options if o.startswith("--signal=")]
    name, seconds = signalled.removeprefix("--signal=").split("@")
    assert name == "TERM"  # "B:TERM" would be for this script, not the tasks
    assert int(seconds) >= 120  # Slurm may be a minute early


@pytest.mark.parametrize("kind", ["cpu", "cuda13", "cuda12", "tpu"])
def test_install_pins_and_adds_the_extra(bench, kind):
    python = bench.clone / ".venv" / "bin" / "python"
    python.write_text(STUB)
    (bench.clone / "requirements.txt").write_text("jax==1\n")
    done = bench.run("install.sh", kind)
    assert done.returncode == 0, done.stderr
    received = (python.parent / "received").read_text().splitlines()
    installs = [c.split("\0")[5:-1] for c in received if "install" in c]
    pins = ["-r", str(bench.clone / "requirements.txt")]
    extra = [[*pins, f"jax[{kind}]", *["gcsfs"] * (kind == "tpu")]]
    extra = [] if kind == "cpu" else extra
    assert installs == [pins, *extra]
    dry = bench.run("install.sh", kind, "--dry-run").stdout.splitlines()
    assert [shlex.split(line)[5:] for line in dry[1:]] == installs


def documented():
    """The command lines of launch/README.md that have a dry run, by their heading."""
    text = (LAUNCH / "README.md").read_text().replace("\\\n", " ")
    exported = {}
    for line in text.splitlines():
        words = shlex.split(line, comments=True) if "launch/" in line[:7] else []
        if line.startswith("export "):
            exported |= dict(word.split("=") for word in line.split()[1:])
        elif words and words[0] in ("launch/tpu.sh", "launch/slurm.sh"):
            yield words, dict(exported)


@pytest.mark.parametrize(
    ("words", "exported"), list(documented()), ids=lambda x: "-".join(x)[7:40]
)
def test_documented_commands_are_understood(bench, words, exported):
    for word in words:
        if word.startswith("--file="):
            (bench.clone / word.removeprefix("--file=")).touch()
    script = Path(words[0]).name
    first = 2 if script == "tpu.sh" else 1
    dry = bench.run(script, *words[1:first], "--dry-run", *words[first:], **exported)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout
