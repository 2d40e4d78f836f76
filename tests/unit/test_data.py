"""The embedded evaluation set through TFDS, and missing data."""

import numpy as np
import pytest

from adadfq_jax import config, evaluation
from adadfq_jax.errors import InputError
from adadfq_jax.runtime import extras
from tests import eval_sets


def test_the_embedded_set_is_fashion_mnists_test_split():
    eval_set = evaluation.load("fashion_mnist", str(config.ASSETS), "test")
    assert eval_set.images.shape == (10_000, 28, 28, 1)
    assert eval_set.images.dtype == np.uint8
    assert np.bincount(eval_set.labels).tolist() == [1000] * 10
    # The original archive starts with these labels; its mean is 0.2868.
    assert eval_set.labels[:8].tolist() == [9, 2, 1, 1, 6, 1, 4, 6]
    assert eval_set.images.mean() / 255 == pytest.approx(0.2868, abs=1e-4)


def test_unprepared_data_is_refused_with_the_ways_out(tmp_path):
    with pytest.raises(InputError, match=r"eval\.data_dir") as caught:
        evaluation.load("cifar10", str(tmp_path), "test")
    message = str(caught.value)
    assert "eval.enabled=False" in message
    # The command must hold as Python, apart from its download.
    code = message.split('python -c "')[1].split('"')[0]
    compile(code, "command", "exec")
    assert f"tfds.builder('cifar10', data_dir='{tmp_path}'" in code


def test_a_set_that_nobody_knows_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"no_such_set.* knows no such set"):
        evaluation.load("no_such_set", str(tmp_path), "test")
    with pytest.raises(InputError, match=r"eval\.dataset=''"):
        evaluation.load("", str(tmp_path), "test")


def small_set(folder, count=7, shape=(8, 8, 3)):
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    labels = np.arange(count) % 10
    eval_sets.write(folder, images, labels, 10, name="cifar10")
    return images, labels


def test_array_record_is_read_as_it_was_written(tmp_path):
    images, labels = small_set(tmp_path)
    found = evaluation.load("cifar10", str(tmp_path), "test")
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.labels, labels)
    with pytest.raises(InputError, match="'nope'"):
        evaluation.load("cifar10", str(tmp_path), "nope")


def test_tfrecord_without_tensorflow_is_refused_with_a_command(tmp_path, monkeypatch):
    small_set(tmp_path)
    info = tmp_path / "cifar10" / "3.0.2" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    monkeypatch.setattr(extras, "are_installed", lambda *_: False)
    with pytest.raises(InputError, match=r"tfrecord.*TensorFlow") as caught:
        evaluation.load("cifar10", str(tmp_path), "test")
    assert "file_format='array_record'" in str(caught.value)


def test_a_damaged_set_is_refused_by_name(tmp_path):
    small_set(tmp_path)
    (record,) = (tmp_path / "cifar10" / "3.0.2").glob("*array_record-0*")
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(InputError, match=r"'cifar10'.*cannot be read"):
        evaluation.load("cifar10", str(tmp_path), "test")
