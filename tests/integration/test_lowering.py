"""Programs for TPU and CUDA, lowered here: precision, loops, and what devices exchange.

    LOWERING=all ./launch/test.sh tests/integration/test_lowering.py

That is every configuration. By default a few, which have among them every part of a
program that there is.
"""

import collections
import functools
import os
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest

from adadfq_jax import game
from adadfq_jax.deploy.network import graph_of, package_function
from adadfq_jax.game import Phase
from adadfq_jax.network import Graph
from adadfq_jax.quant import SHRINKS, RangeState
from adadfq_jax.runtime import sharding
from adadfq_jax.training import build
from adadfq_jax.training.spec import resolve
from tests.configurations import CONFIGS, get_config

PLATFORMS = ("tpu", "cuda")
# What programs differ in: configuration, its options, network.
VARIANTS = {
    "fashion_mnist": ("fashion_mnist_resnet20", "w4a4", "resnet20"),
    "fashion_mnist_paper": ("fashion_mnist_resnet20", "w4a4,paper", "resnet20"),
    "fashion_mnist_mobilenet": (
        "fashion_mnist_mobilenet_v2",
        "w4a4",
        "mobilenetv2_small",
    ),
    "cifar10": ("cifar10_resnet20", "w4a4", "resnet20"),
    "cifar100": ("cifar100_resnet20", "w4a4", "resnet20"),
    "resnet18": ("imagenet_resnet18", "w4a4", "resnet18"),
    "resnet18_tpu": ("imagenet_resnet18", "w4a4,tpu", "resnet18"),
    "resnet50": ("imagenet_resnet50", "w4a4", "resnet50"),
    "resnet50_tpu": ("imagenet_resnet50", "w4a4,tpu", "resnet50"),
    "resnet50b": ("imagenet_resnet50", "w4a4", "resnet50b"),
    "mobilenetv2_w1": ("imagenet_mobilenet_v2", "w4a4", "mobilenetv2_w1"),
    "mobilenetv2_tpu": ("imagenet_mobilenet_v2", "w4a4,tpu", "mobilenetv2_w1"),
    "efficientnet_lite0": (
        "imagenet_efficientnet_lite0",
        "w8a8",
        "tf_efficientnet_lite0",
    ),
    "mobilenet_v2": ("imagenet_mobilenet_v2", "w4a4", "mobilenet_v2"),
}


class Case(NamedTuple):
    variant: str
    phase: Phase
    count: int  # steps in a dispatch
    devices: int

    def __str__(self):
        variant, phase, count, devices = self
        return f"{variant}-{phase.value}-{count}-{devices}"


FEW = [
    Case("fashion_mnist", Phase.BOTH, 1, 1),
    Case("fashion_mnist", Phase.BOTH, 1, 4),
    Case("fashion_mnist", Phase.BOTH, 1, 8),
    Case("fashion_mnist", Phase.OBSERVE, 1, 8),
    Case("fashion_mnist", Phase.G_ONLY, 1, 8),
    Case("cifar10", Phase.BOTH, 50, 1),
    Case("cifar10", Phase.BOTH, 50, 8),
    Case("mobilenet_v2", Phase.OBSERVE, 1, 8),
]
EVERY = [
    *(
        Case(variant, Phase.BOTH, count, devices)
        for variant in VARIANTS
        for count in (1, 50)
        for devices in (1, 4, 8)
    ),
    *(
        Case(variant, phase, 1, 8)
        for variant in VARIANTS
        for phase in (Phase.OBSERVE, Phase.G_ONLY)
    ),
]
CASES = EVERY if os.environ.get("LOWERING") == "all" else FEW


def test_every_configuration_is_among_the_variants():
    named = {path.stem for path in CONFIGS} - {"any"}  # which names no network
    assert {file for file, _, _ in VARIANTS.values()} == named


def configuration(variant):
    file, options, network = VARIANTS[variant]
    config = get_config(CONFIGS[0].parent / f"{file}.py", options)
    config.teacher.model = network
    if config.recipe == "best":  # the same program, and more in it
        config.recipe = "adadfq_tuned"
    return resolve(config)


class Program(NamedTuple):
    """A case's program, in StableHLO by platform, and its arguments' shapes."""

    case: Case
    text: dict[str, str]
    state: object
    graph: Graph


def replicated(tree, devices):
    """Abstract values, whole on each device."""
    mesh = jax.sharding.Mesh(np.asarray(devices), (sharding.AXIS,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree
    )


@functools.cache
def lower(case):
    """The program of a case, from shapes alone."""
    config = configuration(case.variant)
    p, devices = config.teacher, jax.devices()[: case.devices]
    steps = None

    def begin(p_variables):
        nonlocal steps
        assembly = build.assemble(config, config.game.batch_size)
        steps, state = build.build_game(assembly, p_variables, devices)
        return state, assembly.teacher(p_variables)

    with jax.default_matmul_precision(config.matmul_precision):
        function = package_function(p.model, p.num_classes, p.image_shape)
        state, fixed = jax.eval_shape(begin, function.variables)
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = jax.jit(steps(case.phase, case.count))
        traced = step.trace(*replicated((state, fixed, key), devices))
        # One by one: in a program for several, some collectives are there for each.
        text = {
            platform: traced.lower(lowering_platforms=(platform,)).as_text()
            for platform in PLATFORMS
        }
    return Program(case, text, state, graph_of(build.network_info(config)))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: str(case))
def program(request):
    return lower(request.param)


def operations(text, name):
    """The lines of an operation."""
    return [line for line in text.splitlines() if f"stablehlo.{name}" in line]


def test_every_product_is_in_full_precision(program):
    for text in program.text.values():
        products = operations(text, "convolution") + operations(text, "dot_general")
        assert len(products) > 50
        for line in products:
            precisions = re.findall(
                r"<precision (\w+)>|precision = \[(\w+), (\w+)\]", line
            )
            named = {word for found in precisions for word in found if word}
            assert named == {"HIGHEST"}, line[:400]


def test_many_steps_are_one_loop():
    once, often = (
        lower(Case("cifar10", Phase.BOTH, count, 1)).text for count in (1, 50)
    )
    for platform in PLATFORMS:
        few, many = once[platform], often[platform]
        assert not operations(few, "while")
        assert len(operations(many, "while")) == 1
        assert len(many) < 1.2 * len(few)


COLLECTIVE = re.compile(
    r'"stablehlo\.(all_reduce|all_gather|all_to_all|reduce_scatter'
    r'|collective_\w+)"\(.*? : \((.*?)\) -> ',
    re.DOTALL,
)


def collectives(text):
    """Counts of (kind, operand), the kind of a reduction with what it does."""
    counts = collections.Counter()
    for found in COLLECTIVE.finditer(text):
        does = re.findall(r"stablehlo\.(add|maximum|minimum) ", found[0])
        counts[" ".join([found[1], *does]), found[2]] += 1
    named = re.findall(r"stablehlo\.(?:all_|reduce_scatter|collective_)", text)
    assert len(named) == counts.total()  # none is written in another form
    return counts


def count(kind, leaves, times=1):
    """As many collectives of float32 leaves."""
    shapes = ["x".join(map(str, (*leaf.shape, "f32"))) for leaf in leaves]
    counts = collections.Counter((kind, f"tensor<{shape}>") for shape in shapes)
    return collections.Counter({key: times * n for key, n in counts.items()})


def exchanged(program, batch, metrics):
    """Counts of collectives by purpose; XLA merges those that can go together."""
    state, leaves = program.state, jax.tree.leaves
    mean, scalar = "all_reduce add", jax.ShapeDtypeStruct((), np.float32)
    share = jax.ShapeDtypeStruct((batch // program.case.devices,), np.float32)
    whole = jax.ShapeDtypeStruct((batch,), np.float32)
    quantiles = jax.ShapeDtypeStruct((len(game.H_QUANTILES),), np.float32)
    purposes = {
        "gradients of G": count(mean, leaves(state.g_params)),
        # Mean and variance, and their gradients on the way back.
        "moments of G's batch norms": count(mean, leaves(state.g_batch_stats), 2),
        "moments of what P's batch norms see": count(
            mean,
            [
                jax.ShapeDtypeStruct((norm.shape[-1],), np.float32)
                for norm in program.graph.batch_norms
            ],
            4,
        ),
        # In G's margin loss, in the metrics, and H' itself for its quantiles: one
        # would do.
        "H'": count("all_gather", [share] * 3),
        "its gradient": count("reduce_scatter add", [whole]),
        "metrics": count(mean, [scalar] * metrics + [quantiles]),
    }
    if program.case.phase is Phase.BOTH:
        purposes["gradients of Q"] = count(mean, leaves(state.q_params))
    if program.case.phase is Phase.OBSERVE:  # Q's two forwards
        quantizers = len(leaves(state.q_ranges)) // len(RangeState._fields)
        both = [scalar] * 2 * quantizers
        purposes["lower ends of ranges"] = count("all_reduce minimum", both)
        purposes["upper ends of ranges"] = count("all_reduce maximum", both)
        if configuration(program.case.variant).quant.act_range == "l3":
            errors = jax.ShapeDtypeStruct((len(SHRINKS),), np.float32)
            tried = [errors] * 2 * quantizers
            purposes["errors by clip ratio"] = count(mean, tried)
    return purposes


# generator, margin, disagreement, agreement, bn_stats; student, student_gap; H', P = y.
METRICS = 9


def number_of_metrics(config, phase):
    """Those, and the loss on framed images."""
    return METRICS + (phase is Phase.BOTH and config.game.framed_weight > 0)


def test_devices_exchange_this_and_nothing_else(program):
    config = configuration(program.case.variant)
    purposes = exchanged(
        program,
        config.game.batch_size,
        number_of_metrics(config, program.case.phase),
    )
    wanted = sum(purposes.values(), collections.Counter())
    for text in program.text.values():
        assert collectives(text) == wanted
        groups = set(re.findall(r"replica_groups = dense<(.*?)> ", text))
        everyone = list(range(program.case.devices))
        assert groups == {str([everyone]) if len(everyone) > 1 else "0"}
