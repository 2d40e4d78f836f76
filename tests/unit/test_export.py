"""quantized.safetensors: packing, rebuilding bit for bit, and refusals."""

import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from adadfq_jax import game
from adadfq_jax.deploy import quantized_file
from adadfq_jax.deploy.codes import pack_codes, unpack_codes
from adadfq_jax.deploy.network import NetworkInfo, function_of, graph_of
from adadfq_jax.errors import InputError
from adadfq_jax.game import players
from tests import helpers
from tests.golden.fill import noise

INFO = NetworkInfo(
    model="resnet20",
    num_classes=10,
    image_shape=(32, 32, 3),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.3),
    weight_bits=4,
    act_bits=4,
)


def with_bits(bits):
    return NetworkInfo(**{**vars(INFO), "weight_bits": bits, "act_bits": bits})


def graph():
    return graph_of(INFO)


@functools.cache
def observed():
    """P of filled weights, and the ranges of Q at 4 bits after one batch."""
    variables, network = helpers.filled_variables("resnet20_cifar10"), graph()
    options = game.QOptions(4, 4)

    @jax.jit
    def observe(variables, images):
        start = players.init_ranges(network)
        p = game.Teacher(variables, {})
        q = players.quantize(network, options, p, {}, start)
        return players.q_observe(network, options, q, images)[1]

    return variables, observe(variables, noise("images", (64, 32, 32, 3)))


def save(path, bits, weight_range="minmax"):
    variables, ranges = observed()
    options = game.QOptions(bits, bits, weight_range)
    network = quantized_file.freeze(
        game.with_clip_ratios(graph(), variables, options),
        {},
        ranges,
        info=with_bits(bits),
        function=function_of(INFO),
        graph=graph(),
        range_ema="corrected",
    )
    return network.save(path).stat().st_size


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_pack_to_their_bit_width_and_back(bits):
    rng = np.random.default_rng(bits)
    shape = (3, 3, 5, 7)
    codes = rng.integers(0, 2**bits, shape).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.size == -(-codes.size * bits // 8)
    np.testing.assert_array_equal(unpack_codes(packed, shape, bits), codes)


def test_packing_is_least_significant_bit_first():
    # 0, 1, 2, 7 in 3 bits: 000 100 010 111 in order of significance.
    codes = np.asarray([0, 1, 2, 7], np.uint8)
    np.testing.assert_array_equal(pack_codes(codes, 3), [0b10001000, 0b1110])


# Shrunken ranges depend on what XLA fuses: integration/test_rounding.py.
@pytest.mark.parametrize("bits", range(2, 9))
def test_rebuilt_kernels_are_those_of_q_bit_for_bit(tmp_path, bits):
    save(tmp_path / "q.safetensors", bits)
    rebuilt = quantized_file.load_quantized(tmp_path / "q.safetensors").variables
    teacher = game.Teacher(observed()[0], {})
    quantize = jax.jit(
        functools.partial(players.quantize, graph(), game.QOptions(bits, bits))
    )
    expected = quantize(teacher, {}, {})
    assert len(rebuilt.kernels) == 22
    for name, kernel in rebuilt.kernels.items():
        np.testing.assert_array_equal(kernel, expected.kernels[name], err_msg=name)
    assert set(rebuilt.variables) == set(graph().beside_kernels)
    for name, leaf in rebuilt.variables.items():
        np.testing.assert_array_equal(leaf, teacher.variables[name], err_msg=name)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rebuilt_logits_are_those_of_q(tmp_path, bits):
    save(tmp_path / "q.safetensors", bits)
    network = quantized_file.load_quantized(tmp_path / "q.safetensors")
    assert network.info == with_bits(bits)
    variables, ranges = observed()
    options, teacher = game.QOptions(bits, bits), game.Teacher(variables, {})
    q = jax.jit(functools.partial(players.quantize, graph(), options))(
        teacher, {}, ranges
    )
    images = noise("others", (200, 32, 32, 3))
    ours = np.asarray(network(images))
    logits = jax.jit(functools.partial(players.q_logits, graph(), options))
    theirs = np.asarray(logits(q, images))
    # A range read elsewhere may differ in its last bit, and a value on the edge of
    # two codes fall to the other side.
    errors = np.abs(ours - theirs).max(-1) / np.abs(theirs).max()
    assert (errors > 1e-4).mean() <= 0.005


def test_the_same_network_gives_the_same_bytes(tmp_path):
    save(tmp_path / "a", 4)
    save(tmp_path / "b", 4)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_four_bits_take_less_than_a_sixth_of_float32(tmp_path):
    size = save(tmp_path / "q.safetensors", 4)
    assert size == (tmp_path / "q.safetensors").stat().st_size
    assert size < sum(p.size * 4 for p in observed()[0].values()) / 6


def test_metadata_holds_the_network_and_nothing_of_the_run(tmp_path):
    save(tmp_path / "q.safetensors", 4)
    with safetensors.safe_open(tmp_path / "q.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert list(metadata) == ["adadfq_jax"]
    described = {"format_version", "kernels", "layer_bits", *vars(INFO)}
    assert set(json.loads(metadata["adadfq_jax"])) == described


def rewrite(path, change, **header):
    """Rewrites a file with `change(tensors)` applied and header entries replaced."""
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "numpy") as file:
        described = json.loads(file.metadata()["adadfq_jax"])
    change(tensors)
    metadata = {"adadfq_jax": json.dumps({**described, **header})}
    safetensors.numpy.save_file(tensors, path, metadata)


CODES, BIAS = "output.kernel.codes", "output.bias"
SCALE, POINT = "output.kernel.scale", "output.kernel.zero_point"
VAR, RANGE = "init_block.bn.var", "stage1_unit1.conv1.conv.kernel:input.range"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(CODES), CODES),
        (lambda t: t.update(too_many=np.zeros(1, np.float32)), "too_many"),
        (lambda t: t.update({CODES: t[CODES][:-1]}), CODES),
        (lambda t: t.update({BIAS: t[BIAS][:3]}), BIAS),
        (lambda t: t.update({BIAS: t[BIAS].astype(np.float64)}), BIAS),
        (
            lambda t: t.update(
                {"stage1_unit1.conv1.conv.kernel:input.range": np.zeros(3, np.float32)}
            ),
            "stage1_unit1.conv1",
        ),
        (lambda t: t.update({BIAS: t[BIAS] * np.float32("nan")}), BIAS),
        (lambda t: t.update({SCALE: -t[SCALE]}), f"{SCALE} must be above 0"),
        (lambda t: t.update({SCALE: np.full_like(t[SCALE], 3e38)}), "not finite"),
        (lambda t: t.update({POINT: t[POINT] + np.float32(0.5)}), f"{POINT} must be"),
        (lambda t: t.update({POINT: t[POINT] + np.float32(2**60)}), f"{POINT} must be"),
        (lambda t: t.update({VAR: -t[VAR]}), f"{VAR} must be 0 or more"),
        (lambda t: t.update({RANGE: t[RANGE][::-1].copy()}), f"{RANGE} must be lo"),
        (lambda t: t.update({"x" * 5000: t.pop(BIAS)}), BIAS),
        (lambda t: t.update({"x" * 5000: t[BIAS]}), "unknown tensors: xxx"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, named):
    path = tmp_path / "q.safetensors"
    save(path, 4)
    rewrite(path, change)
    with pytest.raises(InputError, match=named) as caught:
        quantized_file.load_quantized(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "header",
    [
        {"format_version": 99},
        {"model": "resnet21"},
        {"num_classes": 7},
        {"weight_bits": 3},
        {"weight_bits": "many"},
        {"act_bits": 40},
        {"first_last_bits": 8},
        {"layer_bits": {"output.kernel": 8}},
        {"image_shape": None},
        {"image_shape": [16.7, 16, 3]},
        {"image_shape": [-32, 32, 3]},
        {"image_shape": [32, 32]},
        {"image_shape": [10**9, 10**9, 3]},
        {"num_classes": 10.0},
        {"weight_bits": 4.9},
        {"act_bits": True},
        {"first_last_bits": 4.5},
        {"mean": [0.5]},
        {"mean": [0.5, 0.5, "0.5"]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"std": [0.2, 0.2, 0.2, 0.2]},
        {"std": [0.2, 0, 0.2]},
        {"std": [0.2, -0.2, 0.2]},
        {"std": [0.2, 0.2, float("inf")]},
        {"model": ["resnet20"]},
        {"kernels": {}},
        {"kernels": ["output.kernel"]},
        {"kernels": {"output.kernel": [10, 64]}},
        {"places": "everywhere"},
        {"places": "all"},
        {"layout": "HWC"},
        {"layout": ["NHWC"]},
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path, header):
    path = tmp_path / "q.safetensors"
    save(path, 4)
    rewrite(path, lambda tensors: None, **header)
    with pytest.raises(InputError, match=r"q\.safetensors"):
        quantized_file.load_quantized(path)


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\xff" * 64])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "q.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"q\.safetensors"):
        quantized_file.load_quantized(path)
    with pytest.raises(InputError, match="no such file"):
        quantized_file.load_quantized(tmp_path / "nothing")
    with pytest.raises(InputError, match="it is a folder"):
        quantized_file.load_quantized(tmp_path)


def test_a_file_of_p_is_said_to_be_quantized_first():
    path = helpers.GOLDEN / "resnet20_cifar10_zip.pth"
    with pytest.raises(InputError, match=r"quantized first, as --mode=inspect"):
        quantized_file.load_quantized(path)


def test_a_network_that_is_none_is_refused(tmp_path):
    save(tmp_path / "q.safetensors", 4)
    with pytest.raises(InputError, match=r"network: str cannot be called"):
        quantized_file.load_quantized(tmp_path / "q.safetensors", "resnet20")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "C64"])
def test_other_types_of_numbers_are_refused_by_name(tmp_path, dtype):
    metadata = {"adadfq_jax": json.dumps({"format_version": 1})}
    path = helpers.write_typed(tmp_path / "q.safetensors", dtype, metadata)
    with pytest.raises(InputError, match=f"weight is of type {dtype}, which") as e:
        quantized_file.load_quantized(path)
    assert str(path) in str(e.value)
