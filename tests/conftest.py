"""Eight virtual CPU devices, set before JAX starts; fixtures that files share."""

import gc
import itertools
import os

from tests import compiling

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = compiling.flags(devices=8)
# XLA's threads, of which sums depend in their last bits: as many in every process. With
# one, compiling takes a fifth less; the other cores have workers of their own.
os.environ["NPROC"] = "1"
# Programs are lowered quicker without the lines of Python that they come from.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import jax
import pytest

from adadfq_jax.runtime import compile_cache, progress
from tests import programs

# A cache of compiled programs for each worker and the processes that it starts: the
# tests of a file share most of their programs. Not one for all: reading an entry that
# another worker was writing has brought a worker down, and few programs are in several
# files.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
os.environ["XDG_CACHE_HOME"] = str(compile_cache.default_folder() / f"tests-{_WORKER}")
compile_cache.enable()

# Tracing makes many objects, so that Python looks for garbage often. It does so more
# seldom here, and not among the modules.
gc.freeze()
gc.set_threshold(100_000, 50, 50)

# A file is played by one worker: one that takes minutes must not be begun last.
_LONG = (
    *("recipes", "report", "deploy", "sharding", "main", "game", "population"),
    *("processes", "open_format", "resume", "imagenet", "train", "ablate", "benchmark"),
    *("quantize_families", "onnx_rules", "onnx_runs", "package", "framing", "docs"),
)


def pytest_collection_modifyitems(items):
    """Files that take minutes first, the others in their order."""
    first = {f"test_{name}.py": rank for rank, name in enumerate(_LONG)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


def pytest_report_teststatus(report):
    """Tests left out for want of a program are named in the closing line."""
    if why := programs.reason(report):
        return why, "s", why.upper()
    return None


@pytest.fixture(scope="module", autouse=True)
def programs_go_with_their_file():
    """Every compiled program maps memory, of which a process may map so many pieces.

    A worker that kept the programs of all files would come to the limit (65,530 on
    Linux), at which compiling ends the process.
    """
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def log_lines_are_printed():
    """Jobs called by a test print what the command prints."""
    progress.show()


@pytest.fixture(autouse=True)
def latencies_are_made_up(monkeypatch):
    """Replace the latencies by made-up ones: measuring compiles StableHLO twice."""
    from adadfq_jax.deploy import verify

    calls = itertools.count(1)  # what is measured again has another latency
    monkeypatch.setattr(
        verify, "latency_ms", lambda run, images: {"1": next(calls), "64": 50}
    )


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """A tiny P's file and a small evaluation set."""
    from tests import jobs

    return jobs.make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def reported(job, tmp_path_factory):
    """The workdir of a run with evaluation, reconstruction and TensorBoard files."""
    from adadfq_jax.jobs import train
    from tests import jobs

    workdir = tmp_path_factory.mktemp("reported") / "run"
    rebuilt = {"iterations": 6, "images": 32, "batch_size": 8}
    values = {
        **jobs.measured(job),
        "log.tensorboard": True,
        **{f"reconstruction.{name}": value for name, value in rebuilt.items()},
    }
    config = jobs.tiny_config(job, **values)
    train.run(config, workdir, command="adadfq --name='<b>&'")
    return workdir
