"""What the launch scripts start elsewhere: on a TPU VM, as a job of Slurm."""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import tarfile
import time

import pytest

from tests.launch_bench import BUCKET, LAUNCH, ODD, SETTINGS, Bench


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


# In place of local.sh: says its arguments; with `wait` among them, waits for a signal.
GAME = """#!/bin/bash
trap 'echo saved; exit 75' TERM
trap 'echo saved; exit 130' INT
printf '<%s>' "$@"
echo
while [[ "$*" == *wait* ]]; do sleep 0.05 & wait $!; done # wait hears a signal at once
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
            # As ssh begins it: bash cannot trap what was ignored at its start, as
            # Ctrl-C is where the tests themselves run in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
    assert (second.returncode, said) == (130, "saved\n")  # resume ends with it too
    assert vm.complete("stop") == (0, "nothing is playing\n")


def test_on_a_vm_a_preemption_is_told_from_stop(vm):
    process = vm.start("run", "wait")
    process.stdout.readline()
    pid = vm.home / "adadfq_jax" / ".job" / "pid"
    while not (pid.exists() and pid.read_text()):  # the game may be faster
        time.sleep(0.02)
    os.kill(int(pid.read_text()), signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


@pytest.mark.parametrize("pid", [None, "4194305"])  # above what Linux gives
def test_on_a_vm_stop_says_that_there_is_no_process_to_stop(vm, pid):
    job = vm.home / "adadfq_jax" / ".job"
    job.mkdir()
    if pid is not None:
        (job / "pid").write_text(pid)
    with open(job / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = vm.complete("stop")
    assert code == 0
    assert said.startswith("no process to stop") and len(said.splitlines()) == 1


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 75, 130, 134, 137, 139])
@pytest.mark.parametrize("restarts", [None, 4, 5])
def test_slurm_requeues_on_75_and_a_few_times_on_a_lost_task(bench, code, restarts):
    bench.answer("codes", code)
    env = {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
    done = bench.run("slurm.sbatch", *ODD, **env)
    assert done.returncode == code
    again = code == 75 or (code in (1, 134, 137, 139) and restarts != 5)
    played, *others = bench.received()
    main = [".venv/bin/python", "-m", "adadfq_jax.main", "--distributed"]
    assert played == ["srun", "--kill-on-bad-exit=0", *main, *ODD]
    assert others == ([["scontrol", "requeue", "123"]] if again else [])


@pytest.mark.parametrize("given", [None, "cpu"])
def test_under_slurm_a_gpu_that_does_not_work_is_no_reason_to_take_the_cpu(
    bench, given
):
    told = bench.stubs / "told"
    (bench.stubs / "srun").write_text(f'#!/bin/bash\necho "$JAX_PLATFORMS" > {told}\n')
    env = {} if given is None else {"JAX_PLATFORMS": given}
    assert bench.run("slurm.sbatch", *ODD, **env).returncode == 0
    assert told.read_text() == f"{given or 'cuda,cpu'}\n"


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
