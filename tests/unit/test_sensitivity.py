"""Sensitivities of layers, and the bits that a budget allows."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import settings
from adadfq_jax.errors import InputError
from adadfq_jax.game import QOptions, players
from adadfq_jax.network import named, trace
from adadfq_jax.training import budget, sensitivity
from adadfq_jax.training.sensitivity import Layer
from tests import helpers, quantized

OPTIONS = QOptions(4, 4, "mse", "l3")


@pytest.fixture(scope="module")
def tiny():
    """The graph of the tiny network, its variables, and images."""
    variables, images = quantized.tiny()
    return helpers.graph("tiny", 10, quantized.TINY_SHAPE), named(variables), images[:8]


@pytest.fixture(scope="module")
def layers(tiny):
    graph, variables, images = tiny
    compiled = []
    original = sensitivity.Programs._divergence

    def counted(*args):
        compiled.append(1)
        return original(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sensitivity.Programs, "_divergence", counted)
        found = sensitivity.measure(graph, OPTIONS, variables, images)
    assert len(compiled) == 1  # one program for all layers and bits
    return found


def test_every_layer_is_measured_and_more_bits_diverge_less(tiny, layers):
    graph, _, _ = tiny
    assert [layer.name for layer in layers] == [
        *("init_block.conv", "unit.conv", "output")
    ]
    assert sum(layer.size for layer in layers) == pytest.approx(1)
    assert sum(layer.multiplications for layer in layers) == pytest.approx(1)
    assert set(layers[0].divergence) == {"kernel"}  # it reads the image
    for layer in layers:
        for by_bits in layer.divergence.values():
            assert by_bits[2] > by_bits[4] > by_bits[8] >= 0
    assert layers[1].activation == graph.activations[0].name


def test_the_divergence_is_that_of_q_with_one_layer_quantized(tiny, layers):
    graph, variables, images = tiny
    options = QOptions(None, None, "minmax", "l3")
    kernel = "unit.conv.kernel"
    own = players.QOptions(3, None, "mse")
    p = players.with_clip_ratios(graph, variables, own)
    q = players.quantize(graph, own, p, {}, players.init_ranges(graph))
    exact = players.quantize(graph, options, p, {}, q.ranges)
    q = exact._replace(kernels={**exact.kernels, kernel: q.kernels[kernel]})
    logits = [
        np.asarray(players.q_logits(graph, options, each, images), np.float64)
        for each in (exact, q)
    ]
    p_log, q_log = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    wanted = np.mean(np.sum(np.exp(p_log) * (p_log - q_log), -1))
    found = layers[1].divergence["kernel"][3]
    assert found == pytest.approx(wanted, rel=1e-2, abs=1e-7)


def made_up(name, size, divergence, activation=""):
    by = {bits: divergence * 4.0 ** (2 - bits) for bits in sensitivity.BITS}
    parts = {"kernel": by, **({"operand": by, "both": by} if activation else {})}
    return Layer(name, f"{name}.kernel", activation, size, size, parts)


def test_the_advice_names_small_layers_that_matter_most():
    few = [made_up("a.b", 0.05, 3.0), made_up("c", 0.85, 9.0), made_up("d", 0.1, 2.0)]
    assert [x.name for x in sensitivity.ranked(few, 4)] == ["c", "a.b", "d"]
    told = sensitivity.advise(few, 4)
    assert "keep `a.b` and `d` at 8 bits" in told and "15.0 % of the weights" in told
    assert settings.layer_rules(told.split("'")[1])[0].pattern == r"a\.b"
    assert "no small layer" in sensitivity.advise([made_up("c", 1.0, 1.0)], 4)
    title, _, head, _, first, *_ = sensitivity.table(few, 4).splitlines()
    assert "ranked at 4 bits" in title and head.split()[:2] == ["layer", "size"]
    assert first.split()[0] == "c" and first.split()[-1] == "-"  # it has no operand


def test_between_measured_bits_the_logarithm_is_interpolated():
    found = budget.interpolated({2: 1.0, 4: 1 / 16, 8: 4.0**-6})
    np.testing.assert_allclose(found, [4.0 ** (2 - k) for k in range(2, 9)])
    # More bits that seem to do harm change nothing.
    assert budget.interpolated({2: 0.1, 8: 0.5}) == pytest.approx([0.1] * 7)


def test_the_choice_is_the_best_of_all():
    rng = np.random.default_rng(0)
    gaps = rng.uniform(0.1, 5, (4, 1)) * 4.0 ** -np.arange(7)
    sizes = rng.integers(10, 200, 4)
    costs = sizes[:, None] * np.arange(2, 9)
    limit = 4 * sizes.sum()
    found = budget.solve(gaps.tolist(), [costs.tolist()], [limit])

    def total(choice):
        if sum(costs[i, k - 2] for i, k in enumerate(choice)) > limit:
            return np.inf
        return sum(gaps[i, k - 2] for i, k in enumerate(choice))

    best = min(map(total, itertools.product(range(2, 9), repeat=4)))
    assert total(found) == pytest.approx(best)
    assert budget.solve(gaps.tolist(), [costs.tolist()], [1]) is None


def test_a_budget_keeps_its_limit_and_what_is_fixed(tiny, layers):
    graph, _, _ = tiny
    sizes = {entry.name: np.prod(entry.shape) for entry in graph.kernels}
    fixed = {"output.kernel": 8}
    limit = settings.parse_budget("bits=3.5")
    found = budget.fit(graph, layers, limit, fixed, 4, 0)
    assert found["output.kernel"] == 8
    mean = sum(found[n] * k for n, k in sizes.items()) / sum(sizes.values())
    assert 3 < mean <= 3.5
    tensors = {a.name: np.prod(a.shape) for a in graph.activations}
    used = sum(found[n] * k for n, k in tensors.items()) / sum(tensors.values())
    assert 2 < used <= 3.5
    limit = settings.parse_budget("size=1kB")
    found = budget.fit(graph, layers, limit, {}, 5, 100)
    assert sum(-(-found[n] * k // 8) for n, k in sizes.items()) + 100 <= 1000
    assert {found[name] for name in tensors} == {5}
    with pytest.raises(
        InputError, match=r"quant\.budget: too small; .* at least 0\.\d"
    ):
        budget.fit(graph, layers, settings.parse_budget("size=0.2kB"), {}, 5, 100)
    with pytest.raises(InputError, match=r"too small; .* at least 2 bits"):
        budget.fit(graph, layers, settings.parse_budget("bits=1"), {}, 5, 100)


def test_a_budget_counts_every_activation_that_a_layer_reads():
    def network(v, x):
        x = x.reshape(-1, 12)
        # The second kernel reads both parts of the sum.
        x = jnp.maximum(x @ v["a"], 0) + jnp.maximum(x @ v["b"], 0)
        return x @ v["c"]

    v = dict.fromkeys("abc", np.ones((12, 12), np.float32))
    graph = trace(network, v, image_shape=(2, 2, 3))
    names = [entry.name for entry in graph.activations]
    assert sorted(names) == ["c:input", "c:input2"]
    by_bits = {bits: 4.0**-bits for bits in sensitivity.BITS}
    layers = [
        Layer(
            *(entry.name, entry.name, entry.activation, 0, 0),
            dict.fromkeys(("kernel", "operand"), by_bits),
        )
        for entry in graph.kernels
    ]
    found = budget.fit(graph, layers, settings.parse_budget("bits=5"), {}, 4, 0)
    assert sum(found[name] for name in names) == 10


def test_the_size_that_a_refusal_names_is_enough(tiny, layers):
    graph, _, _ = tiny
    with pytest.raises(InputError, match=r"at least 1\.\d kB") as refused:
        budget.fit(graph, layers, settings.parse_budget("size=1kB"), {}, 4, 990)
    size = str(refused.value).split()[-2]
    found = budget.fit(
        graph, layers, settings.parse_budget(f"size={size}kB"), {}, 4, 990
    )
    assert min(found.values()) == 2


def test_a_budget_with_nothing_to_choose_is_kept_or_refused(tiny, layers):
    graph, _, _ = tiny
    fixed = {entry.name: 4 for entry in (*graph.kernels, *graph.activations)}
    limit = settings.parse_budget("bits=4")
    assert budget.fit(graph, layers, limit, fixed, 4, 0) == fixed
    for text in ("bits=3.9", "size=0.1kB"):
        with pytest.raises(InputError, match="too small"):
            budget.fit(graph, layers, settings.parse_budget(text), fixed, 4, 0)


@pytest.mark.parametrize("text", ["150kB", "size=150", "bits=", "size=.kB", "bits=1.9"])
def test_other_budgets_are_refused(text):
    assert not settings.ROWS["quant.budget"].rule.holds(text)


def test_the_file_holds_all_numbers(layers):
    found = json.loads(json.dumps(sensitivity.to_json(layers)))
    assert found[1]["divergence"]["both"]["4"] == layers[1].at(4)
