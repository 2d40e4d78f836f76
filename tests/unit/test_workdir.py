"""The folder of a run: who has it."""

from pathlib import Path

import pytest

from adadfq_jax.errors import InputError
from adadfq_jax.training import workdir


def test_of_two_starts_at_once_the_second_leaves_the_folder_to_the_first(
    tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    with workdir.occupy(folder, {"seed": 0}):
        before = (folder / workdir.LOCK_FILE).stat().st_ino
        with monkeypatch.context() as patched:
            # As the second start saw it, before the first made it.
            patched.setattr(Path, "exists", lambda self: False)
            with (
                pytest.raises(InputError, match="another run is using it"),
                workdir.occupy(folder, {"seed": 0}),
            ):
                pass
        assert (folder / workdir.LOCK_FILE).stat().st_ino == before


def test_a_start_that_is_refused_leaves_no_new_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise InputError("no")

    monkeypatch.setattr(workdir, "check", refuse)
    with pytest.raises(InputError, match="no"), workdir.occupy(tmp_path / "run", {}):
        pass
    assert not (tmp_path / "run").exists()
