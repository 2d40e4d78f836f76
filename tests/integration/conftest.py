"""What several tests of processes look at."""

import pytest

from tests import runs


@pytest.fixture(scope="session")
def finished(job, tmp_path_factory):
    """The workdir of an undisturbed run of the job; whoever changes it takes a copy."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = runs.main(*job.arguments(f"--workdir={workdir}"))
    assert done.returncode == 0, done.stderr
    return workdir
