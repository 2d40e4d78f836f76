"""The package as others install it: a wheel, away from the clone; without extras."""

import json
import shutil
import sys
import zipfile

import pytest

from adadfq_jax.runtime.versions import __version__
from tests import runs
from tests.jobs import ROOT

BUILD = "import sys; from setuptools import build_meta; build_meta.{}(sys.argv[1])"
CONFIG = [
    "--config=fashion_mnist_resnet20:w4a4",
    "--config.eval.split=test[:20]",
    "--config.eval.batch_size=20",
]
SHORT = [
    "--quiet",
    "--config.game.generator_channels=8",
    "--config.game.steps=1",
    "--config.game.observe_steps=1",
    "--config.game.warmup_steps=1",
    "--config.reconstruction.iterations=0",
    "--config.eval.between=0",
    "--config.report.enabled=False",
    "--config.export.onnx=False",
    "--config.export.stablehlo=False",
]


def build(what, source, folder):
    """What setuptools builds of a source, without the network."""
    command = [sys.executable, "-c", BUILD.format(f"build_{what}"), folder]
    done = runs.run(command, cwd=source)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl" if what == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("adadfq_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    shutil.unpack_archive(build("sdist", source, folder), folder)
    return build("wheel", folder / f"adadfq_jax-{__version__}", folder)


@pytest.fixture(scope="module")
def adadfq(wheel, tmp_path_factory):
    """The installed command, called in a folder away from the clone."""
    place = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--quiet"]
    offline = ["--no-deps", "--no-index", "--target", place / "packages"]
    done = runs.run([*install, *offline, wheel], cwd=place)
    assert done.returncode == 0, done.stderr
    script = place / "packages" / "bin" / "adadfq"

    def call(*arguments):
        path = {"PYTHONPATH": str(place / "packages")}
        return runs.run([script, *arguments], env=path, cwd=place)

    call.place = place
    return call


def files_below(folder, inside=""):
    """Names in the package of a folder's files, without what Python leaves there."""
    return {
        f"adadfq_jax/{inside}{path.relative_to(folder)}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_has_every_file_and_the_configurations(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    configs = {n for n in files_below(ROOT / "configs", "configs/") if ".py" in n}
    assert packed == files_below(ROOT / "adadfq_jax") | configs
    assert len(configs) >= 8


def test_the_embedded_job_runs_away_from_the_clone(adadfq):
    done = adadfq("train", *CONFIG, "--workdir=run", *SHORT)
    assert done.returncode == 0, done.stderr
    run = adadfq.place / "run"
    summary = runs.summary_of(run)
    assert summary["p_top1"] > 80 and summary["q_last_top1"] is not None
    command = "adadfq train --config=fashion_mnist_resnet20:w4a4 "
    assert summary["command"].startswith(command)
    teacher = json.loads((run / "config.json").read_text())["teacher"]
    assert teacher["path"].startswith(str(adadfq.place / "packages" / "adadfq_jax"))

    told = adadfq("inspect", "--file=run/quantized.safetensors")
    assert "network     resnet20, W4A4" in told.stdout
    assert (
        "    adadfq evaluate --config=NAME --file=run/quantized.safeten" in told.stdout
    )

    done = adadfq(
        "export",
        "--workdir=run",
        *CONFIG,
        "--config.export.stablehlo=False",
    )
    assert done.returncode == 0, done.stderr
    assert "run/quantized.onnx" in done.stdout
    assert (run / "quantized.onnx").exists() and (run / "export.json").exists()


# The command, where nothing of the extras can be imported.
BARE = """
import sys
EXTRAS = ["array_record", "matplotlib", "onnx", "onnxruntime", "PIL", "tensorboardX"]
OTHERS = ["huggingface_hub", "tensorflow_datasets"]
sys.modules.update(dict.fromkeys([*EXTRAS, *OTHERS]))
from adadfq_jax import cli
cli.main()
"""


def bare(*arguments):
    return runs.run([sys.executable, "-c", BARE, *arguments])


WANTED = [
    "--config.report.enabled=True",
    "--config.export.stablehlo=True",
    "--config.eval.enabled=False",
]


def test_training_needs_no_extra(job, tmp_path):
    """The files that an extra is needed for are left out, in a line each."""
    workdir = tmp_path / "run"
    flags = [a for a in job.arguments(*WANTED) if a != "--config.export.onnx=False"]
    done = bare("train", *flags, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stdout.splitlines() if "WARNING" in line]
    assert [line for line in warnings if "adadfq_jax[" in line] == [
        "WARNING: quantized.onnx will be left out: an ONNX file needs onnx and"
        " onnxruntime: pip install 'adadfq_jax[onnx]', or config.export.onnx=False",
        "WARNING: no report: a report needs matplotlib: pip install"
        " 'adadfq_jax[report]'",
    ]
    exported = json.loads((workdir / "export.json").read_text())
    assert set(exported["files"]) == {"stablehlo"}

    refused = bare("export", f"--workdir={workdir}", *flags)
    runs.assert_refused(refused, "pip install 'adadfq_jax[onnx]'")
    assert (workdir / "quantized.stablehlo").exists()


@pytest.mark.parametrize(
    ("wanted", "extra"),
    [
        (["--config.export.onnx=True", "--config.eval.enabled=False"], "onnx"),
        (
            ["--config.log.tensorboard=True", "--config.eval.enabled=False"],
            "tensorboard",
        ),
        (["--config.eval.enabled=True"], "eval"),
    ],
)
def test_what_is_asked_for_is_refused_before_training(job, tmp_path, wanted, extra):
    workdir = tmp_path / "run"
    done = bare("train", *job.arguments(*wanted), f"--workdir={workdir}")
    runs.assert_refused(done, f"pip install 'adadfq_jax[{extra}]'")
    assert not workdir.exists()
