"""Folders of image files: decoding, class order, streaming, and what is refused."""

import dataclasses
import shutil
import struct
import threading
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from adadfq_jax import evaluation
from adadfq_jax.deploy import verify
from adadfq_jax.errors import ExportError, InputError
from adadfq_jax.evaluation.evaluator import Evaluator
from adadfq_jax.evaluation.sets import Encoded, StreamedSet
from adadfq_jax.settings import Eval
from tests import eval_sets, image_files
from tests.helpers import pixels_as_logits

CLASSES = ("ant", "bee", "cat", "dog")
DECODING = evaluation.Decoding((16, 16, 3), resize=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty JPEGs of four classes."""
    folder = tmp_path_factory.mktemp("images") / "val"
    image_files.write(folder, CLASSES, 10)
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    """A copy that may be spoilt."""
    return shutil.copytree(folder, tmp_path / "val")


def opened(folder, split="validation", classes="", count=4, decoding=DECODING):
    return evaluation.stream_folder(folder, split, str(classes), count, decoding)


def prepared(folder, names=CLASSES):
    """All images by Pillow alone, in the order of the names."""
    paths = [(path, i) for i, n in enumerate(names) for path in (folder / n).iterdir()]
    images = np.stack([image_files.prepare(path, 20, 16) for path, _ in paths])
    return evaluation.EvalSet(
        images, np.asarray([label for _, label in paths], np.int32)
    )


def in_order(eval_set):
    """Rows (pixels, label) sorted, for comparing sets of another order."""
    rows = zip(eval_set.images, eval_set.labels, strict=True)
    return sorted((image.tobytes(), int(label)) for image, label in rows)


@pytest.mark.parametrize(("height", "width"), [(40, 31), (31, 40), (20, 20), (17, 90)])
@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_files_are_prepared_as_torchvision_does_with_pillow(
    tmp_path, height, width, kind
):
    path = tmp_path / "image.png"
    image = image_files.picture(np.random.default_rng(1), height, width)
    Image.fromarray(image).save(path)
    found = evaluation.Decoding((16, 16, 3), 20, kind)(Encoded("x", 0, path))
    expected = image_files.prepare(path, 20, 16, Image.Resampling[kind.upper()])
    np.testing.assert_array_equal(found, expected)


def triangle(size, wanted):
    """Weights [wanted, size] of the antialiased bilinear filter."""
    scale = size / wanted
    centre = (np.arange(wanted) + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centre[:, None]) / max(scale, 1)
    weights = np.maximum(1 - distance, 0)
    return weights / weights.sum(1, keepdims=True)


def test_resizing_is_antialiased(tmp_path):
    """Against the filter's definition, of noise, to a rounding in either direction."""
    image = np.random.default_rng(2).integers(0, 256, (64, 48, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "noise.png")
    decoding = evaluation.Decoding((20, 16, 3), resize=20)
    found = decoding(Encoded("x", 0, tmp_path / "noise.png"))
    rows, columns = triangle(64, int(20 * 64 / 48)), triangle(48, 20)
    expected = np.einsum("yh,xw,hwc->yxc", rows, columns, image)[3:23, 2:18]
    assert np.abs(found - expected).max() <= 1.01


def test_grey_and_transparent_images_become_rgb_and_all_grey_for_one_channel(tmp_path):
    image = image_files.picture(np.random.default_rng(3), 30, 30)
    for mode in ("L", "RGBA", "P"):
        path = tmp_path / f"{mode}.png"
        Image.fromarray(image).convert(mode).save(path)
        found = DECODING(Encoded("x", 0, path))
        np.testing.assert_array_equal(found, image_files.prepare(path, 20, 16))
    grey = evaluation.Decoding((16, 16, 1), 20)(Encoded("x", 0, tmp_path / "RGBA.png"))
    assert grey.shape == (16, 16, 1) and grey.std() > 0
    with pytest.raises(InputError, match="1 or 3 channels"):
        evaluation.Decoding((16, 16, 2))
    with pytest.raises(InputError, match=r"eval\.resize=15"):
        evaluation.Decoding((16, 12, 3), 15)


@pytest.mark.parametrize("devices", [1, 2])
def test_folder_evaluation_equals_array_evaluation(folder, devices):
    streamed, arrays = opened(folder), prepared(folder)
    assert in_order(streamed.first(99)) == in_order(arrays)
    for eval_set in (streamed, arrays):
        assert eval_set.size == 40

    def top1(eval_set):
        evaluator = Evaluator(
            pixels_as_logits,
            eval_set,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            batch_size=12,
            devices=jax.devices()[:devices],
        )
        return evaluator.top1(jnp.float32(1))

    assert top1(streamed) == top1(arrays) == top1(streamed)
    assert 0 < top1(arrays) < 100


def test_classes_are_sorted_and_the_first_images_are_of_all(folder):
    streamed = opened(folder)
    assert "ant is 0, dog is 3" in streamed.description
    assert "sorted by name" in streamed.description
    assert set(streamed.first(12).labels) == {0, 1, 2, 3}
    again = opened(folder).first(12)
    np.testing.assert_array_equal(again.images, streamed.first(12).images)


def test_a_file_gives_the_class_order(folder, tmp_path):
    names = ("dog", "ant", "cat", "bee")
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(names) + "\n\n")
    streamed = opened(folder, classes=classes)
    assert in_order(streamed.first(40)) == in_order(prepared(folder, names))
    assert f"in the order of {classes}: dog is 0, bee is 3" in streamed.description


def test_slices_part_the_set(folder):
    whole = in_order(opened(folder).first(40))
    halves = [opened(folder, split) for split in ("test[:50%]", "test[50%:]")]
    assert [half.size for half in halves] == [20, 20]
    parts = [row for half in halves for row in in_order(half.first(40))]
    assert sorted(parts) == whole
    assert opened(folder, "[:7]").size == opened(folder, "[33:]").size == 7


def test_batches_keep_the_order_whatever_takes_longest():
    """And decoding runs ahead of the batch, but not by more than two of them."""
    done, lock = [], threading.Lock()

    def decode(row):
        time.sleep(0.002 * (row.label % 3))
        with lock:
            done.append(row.label)
        return np.full((2, 2, 1), row.label, np.uint8)

    rows = [Encoded(str(i), i, b"") for i in range(100)]
    streamed = StreamedSet(100, lambda: rows, decode, "a set")
    batches = streamed.batches(8)
    found = [next(batches)]
    end = time.monotonic() + 30
    while len(done) < 24 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(done) == 24
    found += batches
    assert len(found) == 13 and sum(b.mask.sum() for b in found) == 100
    labels = np.concatenate([b.labels[b.mask > 0] for b in found])
    np.testing.assert_array_equal(labels, np.arange(100))
    np.testing.assert_array_equal(found[3].images[:, 0, 0, 0], found[3].labels)


def test_the_export_check_takes_the_first_images_and_allows_for_the_sample(
    folder, monkeypatch
):
    monkeypatch.setattr(verify, "SAMPLE", 12)
    images = verify.evaluation_images(opened(folder), "folder val")
    assert len(images.labels) == 12
    np.testing.assert_array_equal(images.pixels, opened(folder).first(12).images)
    whole = verify.evaluation_images(prepared(folder), "arrays")
    assert len(whole.labels) == len(prepared(folder).labels) > 12
    labels = np.zeros(1000, np.int32)
    ours = np.eye(2)[np.zeros(1000, int)]  # all right
    theirs = ours.copy()
    theirs[:4] = 1 - theirs[:4]  # 0.4 points wrong: twice the error, and the 0.1
    sample = verify.Images(images.pixels, labels, "a set")
    own = verify.Differences()
    found = verify.compare(ours, theirs, sample, own)
    assert found["top1_error"] == pytest.approx(100 * (0.004 / 1000) ** 0.5)
    verify.require_agreement("file", found)
    theirs[:8] = 1 - ours[:8]
    with pytest.raises(ExportError, match=r"top-1 99\.20 % instead of 100"):
        verify.require_agreement("file", verify.compare(ours, theirs, sample, own))
    theirs[4:8] = ours[4:8]
    monkeypatch.setattr(verify, "LARGE", 1000)  # then 0.1 point is all that is allowed
    with pytest.raises(ExportError, match=r"top-1 99\.60 % instead of 100"):
        verify.require_agreement("file", verify.compare(ours, theirs, sample, own))


def test_rows_that_go_missing_are_noticed():
    rows = [Encoded("x", 0, b"")] * 5
    streamed = StreamedSet(6, lambda: rows, lambda row: np.zeros((2, 2, 1)), "a set")
    with pytest.raises(InputError, match="a set: 5 images were read instead of 6"):
        list(streamed.batches(4))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


SPOILT = {
    "truncated": (truncate, r"ant_3\.JPEG: .*cannot be read.*truncated"),
    "a text": (lambda p: p.write_text("hello"), r"ant_3\.JPEG: .*no known format"),
    "empty": (lambda p: p.write_bytes(b""), r"ant_3\.JPEG: .*cannot be read"),
    "gone": (lambda p: p.unlink(), r"ant_3\.JPEG: .*cannot be read"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_an_image_that_cannot_be_read_is_named(copied, spoil, message):
    streamed = opened(copied)
    spoil(copied / "ant" / "ant_3.JPEG")
    with pytest.raises(InputError, match=message):
        list(streamed.batches(8))


def test_images_of_another_size_need_the_key(folder):
    with pytest.raises(InputError, match=r"\.JPEG: it is .* eval\.resize"):
        opened(folder, decoding=evaluation.Decoding((16, 16, 3))).first(1)


REFUSED = {
    "no folder": (lambda f: shutil.rmtree(f), {}, "val: No such file"),
    "no class": (
        lambda f: [shutil.rmtree(f / n) for n in CLASSES],
        {},
        "no class folders",
    ),
    "another count": (lambda f: None, {"count": 5}, "has 4 classes, .* has 5"),
    "a class without images": (
        lambda f: [path.unlink() for path in (f / "cat").iterdir()],
        {},
        r"val/cat: there are no images",
    ),
    "another file": (
        lambda f: (f / "cat" / "notes.gif").write_bytes(b"GIF89a\0"),
        {},
        r"notes\.gif: not an image",
    ),
    "a bad slice": (lambda f: None, {"split": "test[1:2:3]"}, r"eval\.split"),
    "an empty slice": (lambda f: None, {"split": "[40:]"}, r"eval\.split"),
    "no class file": (lambda f: None, {"classes": "none.txt"}, r"none\.txt"),
}


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"), REFUSED.values(), ids=REFUSED
)
def test_folders_that_cannot_be_used_are_refused(copied, spoil, arguments, message):
    spoil(copied)
    with pytest.raises(InputError, match=message):
        opened(copied, **arguments)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("ant", "bee", "cat"), "'dog' is in .* but not listed"),
        ((*CLASSES, "eel"), "'eel' has no folder"),
        ((*CLASSES, "ant"), "'ant' is listed twice"),
    ],
)
def test_class_files_that_do_not_fit_are_refused(folder, tmp_path, names, message):
    (tmp_path / "classes.txt").write_text("\n".join(names))
    with pytest.raises(InputError, match=rf"classes\.txt: class {message}"):
        opened(folder, classes=tmp_path / "classes.txt")


def test_folders_that_are_numbers_need_the_order_of_p(tmp_path):
    names = [str(n) for n in range(12)]
    image_files.write(tmp_path / "val", names, 1)
    with pytest.raises(InputError, match=r"10 comes before 2; eval\.classes"):
        opened(tmp_path / "val", count=12)
    (tmp_path / "classes.txt").write_text("\n".join(names))
    streamed = opened(tmp_path / "val", classes=tmp_path / "classes.txt", count=12)
    assert "0 is 0, 11 is 11" in streamed.description
    image_files.write(tmp_path / "padded", [f"{n:02}" for n in range(12)], 1)
    assert "00 is 0, 11 is 11" in opened(tmp_path / "padded", count=12).description


def test_hidden_files_are_passed_over(copied):
    (copied / "ant" / ".DS_Store").write_text("x")
    (copied / ".thumbnails").mkdir()
    streamed = opened(copied)
    assert streamed.size == 40 and "skipped" not in streamed.description


def test_what_systems_and_people_leave_is_skipped_and_counted(copied):
    (copied / "__MACOSX").mkdir()
    (copied / "__MACOSX" / "x.JPEG").write_bytes(b"\0\5\x16\7")
    (copied / "ant" / "Thumbs.db").write_bytes(bytes(600))
    (copied / "ant" / "desktop.ini").write_bytes(b"\xff\xfe[\0")
    (copied / "bee" / "LICENSE").write_text("\u672c \u00e9t\u00e9" * 300)
    (copied / "readme.txt").write_text("where these come from")
    streamed = opened(copied)
    assert streamed.size == 40
    assert "5 other files skipped (LICENSE, Thumbs.db, __MACOSX" in streamed.description


def depth_file(path, image, mode):
    """An image of the given depth; image: uint8 [H, W]."""
    if mode == "16":
        Image.fromarray(image.astype(np.uint16) * 257).save(path)
    elif mode == "16 big-endian":
        big = Image.frombytes(
            "I;16B", image.shape[::-1], (image.astype(">u2") * 257).tobytes()
        )
        big.save(path)
    else:
        Image.fromarray(image.astype(np.float32) / 255).save(path)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("16", "png"),
        ("16", "tiff"),
        ("16 big-endian", "tif"),
        ("16", "pgm"),
        ("float", "tif"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_images_are_read_as_what_they_show(tmp_path, mode, suffix, channels):
    image = image_files.picture(np.random.default_rng(3), 16, 16)[..., 0]
    path = tmp_path / f"deep.{suffix}"
    depth_file(path, image, mode)
    found = evaluation.Decoding((16, 16, channels))(Encoded("x", 0, path))
    np.testing.assert_array_equal(found, np.repeat(image[..., None], channels, -1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused_by_name(tmp_path, dtype):
    pixels = np.arange(256).reshape(16, 16).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    decoding = evaluation.Decoding((16, 16, 3))
    with pytest.raises(InputError, match=r"deep\.tif: its pixels are .* 0 to 255"):
        decoding(Encoded("deep.tif", 0, tmp_path / "deep.tif"))


def test_sixteen_bit_colours_keep_their_high_byte(tmp_path):
    """Pillow reads them so itself."""
    path = tmp_path / "rgb.png"
    image = image_files.picture(np.random.default_rng(3), 16, 16)
    path.write_bytes(png_of_16_bits(image))
    found = evaluation.Decoding((16, 16, 3))(Encoded("x", 0, path))
    np.testing.assert_array_equal(found, image)


def png_of_16_bits(image):
    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    height, width, _ = image.shape
    rows = (image.astype(">u2") * 257).astype(">u2").reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_a_folder_without_classes_is_streamed_alone(tmp_path):
    image_files.write(tmp_path, ["images"], 5)
    flat = tmp_path / "images"
    (flat / "Thumbs.db").write_bytes(bytes(9))
    chosen = Eval(dataset="folder", data_dir=str(flat), split="", resize=20)
    assert evaluation.is_unlabelled(chosen)
    parent = dataclasses.replace(chosen, data_dir=str(tmp_path))
    assert not evaluation.is_unlabelled(parent)
    streamed = evaluation.load_unlabelled(chosen, (16, 16, 3))
    assert streamed.size == 5 and "no classes; 1 other files" in streamed.description
    with pytest.raises(InputError, match=r"no class folders.*how often Q answers"):
        opened(flat)


def test_tfds_images_of_many_sizes_are_streamed(tmp_path):
    rng = np.random.default_rng(5)
    images = [image_files.picture(rng, *rng.integers(24, 60, 2)) for _ in range(70)]
    eval_sets.write(tmp_path, images, np.arange(70) % 10, 10, name="cifar10")
    streamed = evaluation.stream("cifar10", str(tmp_path), "test", 10, DECODING)
    assert streamed.size == 70
    batches = list(streamed.batches(32))
    assert [int(batch.mask.sum()) for batch in batches] == [32, 32, 6]
    found = np.concatenate([batch.images for batch in batches])[:70]
    for image, pixels in zip(found, images, strict=True):
        Image.fromarray(pixels).save(tmp_path / "one.png")
        expected = image_files.prepare(tmp_path / "one.png", 20, 16)
        np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(
        np.concatenate([b.labels for b in batches])[:70], np.arange(70) % 10
    )
    assert (
        evaluation.stream("cifar10", str(tmp_path), "test[:10%]", 10, DECODING).size
        == 7
    )
    with pytest.raises(InputError, match="10 classes, the network has 1,000"):
        evaluation.stream("cifar10", str(tmp_path), "test", 1000, DECODING)
    with pytest.raises(InputError, match="'nope'"):
        evaluation.stream("cifar10", str(tmp_path), "nope", 10, DECODING)
