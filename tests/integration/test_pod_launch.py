"""The scripts on one's own machine, against stubs of gcloud and Slurm."""

import shlex
from pathlib import Path

import pytest

from tests.launch_bench import BUCKET, LAUNCH, ODD, SETTINGS, STUB, Bench


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
    ("value", "spot"), [("1", True), ("True", True), ("0", False), ("no", False)]
)
def test_a_true_value_alone_asks_for_a_spot_machine(bench, value, spot):
    bench.answer("states", "ACTIVE")
    assert bench.run("tpu.sh", "create", *SETTINGS, SPOT=value).returncode == 0
    assert ("--spot" in bench.received()[0]) == spot
    refused = bench.run("tpu.sh", "create", *SETTINGS, SPOT="perhaps")
    assert refused.returncode == 2
    assert "SPOT=perhaps" in refused.stderr
    assert bench.received() == []


@pytest.mark.parametrize("workdir", ["gs://bucket/w4a4/", "runs/w4a4", "/disk/w4a4"])
def test_a_run_is_fetched_into_a_folder_of_its_name(bench, workdir):
    bench.run("tpu.sh", "fetch", *SETTINGS, f"--workdir={workdir}", "--to=there")
    made, copied = bench.received()
    assert made == ["mkdir", "-p", "there/w4a4"]
    # rsync copies what is in the folder, scp the folder.
    destination = "there/w4a4" if "rsync" in copied else "there"
    assert destination in copied


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
    "a process was lost": (
        ["ACTIVE"] * 9,
        [1, 134, 137, 143, 0],
        ["list", *["run", "list", "list"] * 4, "run"],
    ),
    "refused on a slice that is going": (
        ["ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"],
        [2, 0],
        ["list", "run", "list", "list", "delete", "create", "list", *SETUP, "run"],
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
        (["ACTIVE"] * 2, [4], 4),
        (["ACTIVE"], [130], 130),
        (["ACTIVE"] * 2, [127], 127),
        (["ACTIVE"] * 12, [255] * 6, 255),
        (["ACTIVE"] * 12, [1, 134] * 3, 134),
        (["FAILED"], [], 1),
    ],
)
def test_resume_gives_up_where_another_try_would_not_help(bench, states, codes, code):
    bench.answer("states", *states)
    bench.answer("codes", *codes)
    assert bench.run("tpu.sh", "resume", *SETTINGS, BUCKET).returncode == code
    assert (bench.stubs / "codes").read_text() == ""


def test_resume_forgets_failures_before_a_run_that_lasted(bench):
    script = bench.clone / "launch" / "tpu.sh"
    text = script.read_text()
    assert "\nlasting=600 " in text
    script.write_text(text.replace("\nlasting=600 ", "\nlasting=0 "))
    bench.answer("states", *["ACTIVE"] * 40)
    bench.answer("codes", *[255, 1] * 6, 0)
    assert bench.run("tpu.sh", "resume", *SETTINGS, BUCKET).returncode == 0


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
    package = ["--no-deps", "--editable", str(bench.clone)]
    assert installs == [pins, package, *extra]
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
