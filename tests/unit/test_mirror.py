"""Workdirs on a storage that only etils.epath opens."""

import pytest

from adadfq_jax.errors import InputError
from adadfq_jax.runtime import remote
from adadfq_jax.training import workdir as folder
from adadfq_jax.training.checkpoints import DIGEST_FILE, Checkpoints
from tests import memory_path
from tests.checkpointing import assert_is, save, state_at
from tests.memory_path import MemoryPath, files_of


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", ())


@pytest.fixture
def bucket():
    return memory_path.empty_bucket()


def fill(place, names):
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)


def test_what_is_published_is_fetched(bucket):
    with remote.opened(bucket) as place:
        assert not place.folder.exists()  # so that a run sees that it is new
        fill(place.folder, ["identity.json", "checkpoints/4/state/d/part"])
        place.claim()
    with remote.opened(bucket) as place:
        assert (
            (place.folder / "checkpoints/4/state/d/part").read_text().endswith("part")
        )
        assert not (place.folder / folder.LOCK_FILE).exists()
        (place.folder / "checkpoints/4/state/d/part").unlink()
        fill(place.folder, ["checkpoints/8/part"])
        place.publish()
    assert files_of(bucket).keys() - {folder.LOCK_FILE} == {
        "identity.json",
        "checkpoints/8/part",
    }


def test_a_store_that_is_away_for_a_moment_is_waited_for(bucket, monkeypatch, capsys):
    waits, real = [], MemoryPath.write_bytes

    def away(self, data):
        if len(waits) < 2:
            raise ConnectionError("503, back soon")
        real(self, data)

    monkeypatch.setattr(remote.time, "sleep", waits.append)
    monkeypatch.setattr(remote, "_WAITS", (1, 2, 4))
    with remote.opened(bucket) as place:
        fill(place.folder, ["identity.json"])
        place.claim()
        fill(place.folder, ["checkpoints/4/part", "checkpoints/4/other"])
        monkeypatch.setattr(MemoryPath, "write_bytes", away)
        place.publish()
        assert waits == [1, 2]
        assert {"checkpoints/4/part", "checkpoints/4/other"} <= files_of(bucket).keys()
        assert "503, back soon" in capsys.readouterr().out
        waits.clear()
        monkeypatch.setattr(remote, "_WAITS", (1,))
        fill(place.folder, ["checkpoints/8/part"])
        with pytest.raises(InputError, match=r"cannot be written \(.*503, back soon"):
            place.publish()
        assert waits == [1]


def test_what_says_that_others_are_whole_is_published_last(bucket, monkeypatch):
    written = []
    real = MemoryPath.write_bytes

    def write_bytes(self, data):
        written.append("/".join(self.parts[3:]))
        return real(self, data)

    monkeypatch.setattr(MemoryPath, "write_bytes", write_bytes)
    with remote.opened(bucket) as place:
        names = ["a", f"checkpoints/4/{DIGEST_FILE}", "checkpoints/4/z", "zz"]
        fill(place.folder, ["summary.json", *names, "identity.json"])
        place.publish()
        assert written[0] == "identity.json"
        assert written[-2:] == [f"checkpoints/4/{DIGEST_FILE}", "summary.json"]
        written.clear()
        fill(place.folder, ["new"])
        place.publish()
    assert written == ["new"]


@pytest.mark.parametrize("writes", range(1, 6))
def test_a_checkpoint_that_was_published_in_part_is_not_used(
    bucket, monkeypatch, writes
):
    with remote.opened(bucket) as place:
        place.folder.mkdir()
        save(place.folder / "checkpoints", [2])
        place.publish()
        save(place.folder / "checkpoints", [4])
        real, left = MemoryPath.write_bytes, iter(range(writes))

        def write_bytes(self, data):
            if next(left, None) is None:
                raise ConnectionError("the network is gone")
            return real(self, data)

        monkeypatch.setattr(MemoryPath, "write_bytes", write_bytes)
        with pytest.raises(InputError, match=f"{bucket}.*the network is gone"):
            place.publish()
    with remote.opened(bucket) as place:
        checkpoints = Checkpoints(place.folder / "checkpoints", 3)
        found, sentences = checkpoints.restore_newest(state_at, read_only=True)
        assert_is(found, 2)
        assert len(sentences) == 1
        assert f"{bucket}/checkpoints/4" in place.with_name(sentences[0])


def test_the_newest_start_wins_and_the_older_one_publishes_nothing(bucket):
    with remote.opened(bucket) as older, remote.opened(bucket) as newer:
        fill(older.folder, ["identity.json"])
        older.claim()
        newer.claim()
        before = files_of(bucket)
        fill(older.folder, ["late"])
        with pytest.raises(InputError, match=f"{bucket}: another run"):
            older.publish()
        assert files_of(bucket) == before
        newer.publish()


@pytest.mark.parametrize("name", ["nothing://bucket/run", "gs://bucket/run"])
def test_a_storage_that_cannot_be_opened_is_refused_by_name(name):
    """There is no such scheme; the library for the other is not installed."""
    with pytest.raises(InputError, match=name), remote.opened(name):
        pass


def test_a_local_folder_is_itself(tmp_path):
    with remote.opened(str(tmp_path)) as place:
        place.claim()
        place.publish()
        assert place.folder == tmp_path and place.title == tmp_path.name
    assert list(tmp_path.iterdir()) == []
