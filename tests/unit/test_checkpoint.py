"""Checkpoints: exact, the newest whole one, damage noticed."""

import numpy as np
import pytest

from adadfq_jax.errors import InputError
from adadfq_jax.training.checkpoints import DIGEST_FILE, Checkpoints
from tests.checkpointing import assert_is, flip, largest_file, save, state_at


def test_the_newest_is_restored_exactly_and_the_last_few_stay(tmp_path):
    save(tmp_path / "c", [2, 4, 6, 8])
    found, sentences = Checkpoints(tmp_path / "c", 3).restore_newest(state_at)
    assert_is(found, 8)
    assert sentences == []
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"4", "6", "8"}


def test_nothing_there_is_nothing_restored(tmp_path):
    assert Checkpoints(tmp_path / "c", 3).restore_newest(state_at) == (None, [])
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("other", ["more", "fewer", "another shape"])
def test_a_checkpoint_of_another_structure_is_refused_and_stays(tmp_path, other):
    save(tmp_path / "c", [2])
    like = state_at(0)
    if other == "more":
        like["shrinks"] = {"kernel": np.ones(4, np.float32)}
    elif other == "fewer":
        del like["params"]
    else:
        like["params"]["kernel"] = np.ones((4, 3), np.float32)
    with pytest.raises(InputError, match=r"c/2: .* not fit .*another workdir"):
        Checkpoints(tmp_path / "c", 3).restore_newest(lambda step: like)
    assert_is(Checkpoints(tmp_path / "c", 3).restore_newest(state_at)[0], 2)


def truncate(folder):
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "a flipped bit": flip,
    "a truncated file": truncate,
    "a missing file": lambda folder: largest_file(folder).unlink(),
    "a file too many": lambda folder: (folder / "more").write_text(""),
    "no digest": lambda folder: (folder / DIGEST_FILE).unlink(),
    "a damaged digest": lambda folder: (folder / DIGEST_FILE).write_bytes(b"\xff"),
    "an empty digest": lambda folder: (folder / DIGEST_FILE).write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_is_noticed_and_the_one_before_is_used(tmp_path, damage):
    save(tmp_path, [2, 4, 6])
    damage(tmp_path / "6")
    checkpoints = Checkpoints(tmp_path, 3)
    found, sentences = checkpoints.restore_newest(state_at)
    assert_is(found, 4)
    assert len(sentences) == 1
    assert str(tmp_path / "6") in sentences[0]
    # The game comes by again and saves the same step.
    checkpoints.save(6, state_at(6), {"seconds": 3.0, "top1": [[1, 2.5]]})
    assert_is(Checkpoints(tmp_path, 3).restore_newest(state_at)[0], 6)


def test_all_damaged_is_none(tmp_path):
    save(tmp_path, [2, 4])
    flip(tmp_path / "2")
    flip(tmp_path / "4")
    found, sentences = Checkpoints(tmp_path, 3).restore_newest(state_at)
    assert found is None
    assert len(sentences) == 2


def test_reading_alone_removes_nothing(tmp_path):
    """The run may be in the middle of a save."""
    save(tmp_path, [2, 4])
    flip(tmp_path / "4")
    (tmp_path / "6.orbax-checkpoint-tmp-12").mkdir()
    before = sorted(tmp_path.rglob("*"))
    checkpoints = Checkpoints(tmp_path, 3)
    found, sentences = checkpoints.restore_newest(state_at, read_only=True)
    assert_is(found, 2)
    assert len(sentences) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_killed_save_leaves_is_removed(tmp_path):
    save(tmp_path, [2])
    half = tmp_path / "4.orbax-checkpoint-tmp-12"
    half.mkdir()
    (half / "part").write_text("x")
    found, _ = Checkpoints(tmp_path, 3).restore_newest(state_at)
    assert_is(found, 2)
    assert not half.exists()


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "c").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=f"{tmp_path}/c.*step 2"):
        save(tmp_path / "c", [2])
