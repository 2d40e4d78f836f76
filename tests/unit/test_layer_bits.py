"""Bits per layer: the rules, the file, and what is said of them."""

import jax.numpy as jnp
import pytest

from adadfq_jax import quant, settings
from adadfq_jax.deploy import model_card, quantized_file
from adadfq_jax.deploy.network import NetworkInfo
from adadfq_jax.errors import InputError
from adadfq_jax.game import layer_bits
from adadfq_jax.jobs import inspection
from adadfq_jax.network import trace
from tests import helpers, plain_loader, quantized
from tests.golden.fill import noise


def resolved(text, graph=None, ends=0):
    graph = graph or helpers.graph("resnet20")
    return layer_bits.resolve(graph, 4, 4, ends, settings.layer_rules(text))


def test_the_last_match_decides_and_either_number_may_be_left_out():
    bits, notes = resolved(r"stage1_.*=w3a5,stage1_unit1\.conv1\.conv=a2,output=w8")
    assert notes == []
    assert bits["stage1_unit1.conv1.conv.kernel"] == 3
    assert bits["stage1_unit1.conv1.conv.kernel:input"] == 2
    assert bits["stage1_unit1.conv2.conv.kernel:input"] == 5
    assert bits["output.kernel"] == 8 and "output.kernel:input" not in bits
    assert not [name for name in bits if name.startswith(("stage2", "init"))]


def test_a_pattern_matches_a_whole_name_and_may_have_commas():
    bits, _ = resolved(r"stage[12]_unit\d{1,2}\.conv1.*=w2, output=w8")
    assert len(bits) == 7
    with pytest.raises(InputError, match="'stage1' matches no layer; the nearest are"):
        resolved("stage1=w2")
    with pytest.raises(InputError, match=r"'outptu' matches no layer.* output"):
        resolved("outptu=w2")


def test_the_first_and_the_last_layer_are_rules_before_the_others():
    bits, _ = resolved("init_block.*=w2", ends=8)
    assert bits["init_block.conv.kernel"] == 2
    assert bits["output.kernel"] == bits["output.kernel:input"] == 8
    assert resolved("output=w4a4", ends=8).bits == {"init_block.conv.kernel": 8}


def test_readers_of_one_activation_get_the_most_bits_and_that_is_said():
    def network(variables, x):
        x = jnp.maximum(x @ variables["a"], 0)
        return (x @ variables["b"] + x @ variables["c"]).mean((1, 2))

    square = noise("square", (4, 4))
    graph = trace(network, dict.fromkeys("abc", square), image_shape=(2, 2, 4))
    bits, notes = resolved("b=w2a3,c=a6", graph)
    assert bits == {"b": 2, "b:input": 6}
    assert notes == [
        "b:input has 6 bits, the most of those that its readers ask for (b for 3, c for"
        " 6)"
    ]
    # The layer without a rule asks for 4.
    assert resolved("b=a3", graph).bits == {}
    _, notes = resolved("a=a8", graph)
    assert "its layers read no quantized activation" in notes[0]


@pytest.mark.parametrize("text", ["output", "output=w9", "output=", "(=w4", "a=w4,b"])
def test_other_texts_are_refused_by_key(text):
    with pytest.raises(InputError, match=r"quant\.layer_bits=.*must be PATTERN"):
        settings.check(
            settings.fill(
                settings.replace(settings.Settings(), {"quant.layer_bits": text}),
                "adadfq",
                {
                    name: 1 if row.default is int else row.default()
                    for name, row in settings.ROWS.items()
                    if isinstance(row.default, type)
                },
            )
        )


@pytest.fixture
def saved(tmp_path):
    """Q of the tiny network with bits of its own, and its file."""
    info = NetworkInfo("tiny", 10, quantized.TINY_SHAPE, (0.5,) * 3, (0.25,) * 3, 4, 4)
    info = info.mixed({"unit.conv.kernel": 2, "output.kernel:input": 8})
    file = quantized.save(tmp_path / "q.safetensors", info, *quantized.tiny())
    return quantized_file.load_quantized(file), file


def test_a_file_holds_the_bits_of_every_layer(saved):
    network, file = saved
    assert network.info.bits == "W4A4 mixed"
    assert [kernel.bits for kernel in network.kernels.values()] == [4, 2, 4]
    assert network.options.bits_of_activation("output.kernel:input") == 8
    header, tensors = plain_loader.read(file)
    assert header["layer_bits"] == {"unit.conv.kernel": 2, "output.kernel:input": 8}
    assert len(set(tensors["unit.conv.kernel"][..., 0].ravel().tolist())) <= 4
    assert quantized_file.to_bytes(network) == file.read_bytes()


def test_the_card_and_the_inspection_list_them(saved):
    network, file = saved
    exported = dict.fromkeys(("file", "sha256"), "-") | {"bytes": 1, "files": {}}
    exported["versions"] = {}
    card = model_card.model_card(network.info, network.graph, exported, None)
    assert "# tiny W4A4 mixed" in card
    assert "**Bits per layer:** W2A4: unit.conv; W4A8: output; all others W4A4" in card
    told = inspection.describe(file)
    assert "tiny, W4A4 mixed" in told and "layers      W2A4: unit.conv" in told


def test_bits_may_be_traced():
    x = noise("x", (50,))
    for bits in (2, 5, 8):
        found = quant.fake_quant(x, -1.0, 1.5, jnp.int32(bits))
        wanted = quant.fake_quant(x, -1.0, 1.5, bits)
        assert jnp.max(jnp.abs(found - wanted)) < 1e-6
