"""Bits per layer that fit a budget and have the least divergence, found exactly.

Every kernel and every activation has one of 2 to 8 bits. The sum of their measured
divergences is minimised under the budget. This is a multiple-choice knapsack, which
SciPy's `milp` (HiGHS) solves exactly. Between the measured numbers of bits the
logarithm of the divergence is interpolated.
"""

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from adadfq_jax import settings
from adadfq_jax.deploy import quantized_file
from adadfq_jax.errors import InputError
from adadfq_jax.game import Teacher, layer_bits, players
from adadfq_jax.network import Function, Graph
from adadfq_jax.runtime import sharding
from adadfq_jax.training import build
from adadfq_jax.training.build import Assembly
from adadfq_jax.training.sensitivity import Layer
from adadfq_jax.training.short_game import measure_on_images, play_short
from adadfq_jax.training.spec import RunSpec

CHOICES = range(2, 9)
_LEAST = 1e-9  # nats; a divergence of 0 has no logarithm


def interpolated(measured: Mapping[int, float]) -> list[float]:
    """Return the divergence at each of `CHOICES`; more bits never diverge more."""
    known = sorted(measured)
    logs = [math.log(max(measured[bits], _LEAST)) for bits in known]
    return np.exp(np.interp(CHOICES, known, np.minimum.accumulate(logs))).tolist()


def solve(
    divergence: Sequence[Sequence[float]],
    costs: Sequence[Sequence[Sequence[float]]],
    limits: Sequence[float],
) -> list[int] | None:
    """Choose one of `CHOICES` for each item, with the least sum of divergences.

    Args:
      divergence: by item and choice.
      costs: by limit, item and choice.
      limits: largest sums of the costs.

    Returns:
      The bits of each item, or None if no choice keeps the limits.
    """
    import scipy.optimize  # here: it takes a quarter of a second of every start

    if not divergence:
        return [] if min(limits) >= 0 else None
    items, choices = np.shape(divergence)
    one_of_each = np.kron(np.eye(items), np.ones(choices))
    found = scipy.optimize.milp(
        np.ravel(divergence),
        integrality=np.ones(items * choices),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_of_each, 1, 1),
            scipy.optimize.LinearConstraint(
                np.reshape(costs, (len(limits), -1)), ub=np.asarray(limits)
            ),
        ],
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        return None
    picked = found.x.reshape(items, choices).argmax(1)
    return [CHOICES[i] for i in picked]


def fit(
    graph: Graph,
    layers: Sequence[Layer],
    budget: settings.Budget,
    fixed: Mapping[str, int],
    act_bits: int,
    other_bytes: int,
) -> dict[str, int]:
    """Choose the bits of every kernel and activation.

    Args:
      graph: the traced network.
      layers: the sensitivities of its layers.
      budget: 'size' limits the bytes of Q's file, and activations have `act_bits`.
        'bits' limits the mean over the values of all kernels, and that over the values
        of all activations.
      fixed: bits by name that are not chosen.
      act_bits: bits of activations that are not chosen, as those that no layer reads.
      other_bytes: bytes of Q's file beside the kernels' codes.

    Raises:
      InputError: nothing keeps the budget.
    """
    of_kernels = {layer.kernel: layer.divergence["kernel"] for layer in layers}
    measured = {
        layer.activation: layer.divergence["operand"]
        for layer in layers
        if layer.activation
    }
    fixed = dict(fixed)
    operands = {layer.kernel: layer.activation for layer in layers}
    for entry in graph.activations:
        if entry.name in measured:
            continue
        # A layer may read several, the parts of a sum, of which one is measured. The
        # others are taken to be as sensitive; what no layer reads is not chosen.
        like = [operands[name] for name in entry.readers if operands.get(name)]
        measured[entry.name] = measured[like[0]] if like else {}
        if not like:
            fixed.setdefault(entry.name, act_bits)
    counts = {entry.name: math.prod(entry.shape) for entry in graph.kernels}
    counts |= {entry.name: math.prod(entry.shape) for entry in graph.activations}
    in_bytes = budget.kind == "size"

    def cost(name: str, bits: int) -> float:
        return -(-counts[name] * bits // 8) if in_bytes else counts[name] * bits

    groups = [of_kernels] if in_bytes else [of_kernels, measured]
    chosen = {entry.name: act_bits for entry in graph.activations} | fixed
    tables = {n: x for group in groups for n, x in group.items() if n not in fixed}
    limits = []
    for group in groups:
        taken = sum(cost(name, fixed[name]) for name in group if name in fixed)
        most = budget.amount * sum(counts[name] for name in group)
        limits.append((budget.amount - other_bytes if in_bytes else most) - taken)
    costs = [
        [[cost(n, bits) if n in group else 0 for bits in CHOICES] for n in tables]
        for group in groups
    ]
    found = solve([interpolated(x) for x in tables.values()], costs, limits)
    if found is None:
        least = budget.amount - limits[0] + sum(row[0] for row in costs[0])
        least = math.ceil(least / 100) / 10  # in kB, so that it is enough
        smallest = (
            f"file has at least {least} kB"
            if in_bytes
            else "layers have at least 2 bits, or what quant.layer_bits and"
            " quant.first_last_bits say"
        )
        raise InputError(f"quant.budget: too small; Q's {smallest}", "quant.budget")
    return chosen | dict(zip(tables, found, strict=True))


def _alike(graph: Graph) -> list[Layer]:
    """Return the layers of a graph as if no number of bits made a difference."""
    none = {part: {CHOICES[0]: 0.0} for part in ("kernel", "operand")}
    return [
        Layer(entry.name, entry.name, entry.activation, 0.0, 0.0, none)
        for entry in graph.kernels
    ]


def _other_bytes(assembly: Assembly, teacher: Teacher) -> int:
    """Return the bytes of Q's file without the kernels' codes, or a little more."""
    graph, info = assembly.graph, assembly.info
    network = quantized_file.freeze(
        sharding.fetch(teacher),
        {},
        players.init_ranges(graph),
        info=info,
        function=assembly.function,
        graph=graph,
        range_ema=assembly.spec.quant.range_ema,
    )
    codes = sum(
        -(-math.prod(entry.shape) * network.kernels[entry.name].bits // 8)
        for entry in graph.kernels
    )
    named = json.dumps(dict.fromkeys(info.bits_by_name(graph), 8))
    # The header is padded, and its offsets have up to a digit more for each tensor.
    return len(quantized_file.to_bytes(network)) - codes + 2 * len(named)


def choose(spec: RunSpec, batch_size: int, function: Function) -> dict[str, int]:
    """Choose the bits per layer for `quant.budget`, after a short game.

    Args:
      spec: the settings of the run.
      batch_size: size of the global batch.
      function: P with its variables.

    Returns:
      The bits of the kernels and activations that differ from `quant.weight_bits` and
      `quant.act_bits`, by name.

    Raises:
      InputError: nothing keeps the budget.
    """
    limit = settings.parse_budget(spec.quant.budget)
    assembly = build.assemble(spec.replace({"quant.budget": ""}), batch_size, function)
    info, graph = assembly.info, assembly.graph
    other_bytes = _other_bytes(assembly, assembly.teacher(function.variables))
    given = layer_bits.resolve(
        graph,
        *(-1, -1),  # so that bits like those of all others are fixed, too
        spec.quant.first_last_bits,
        settings.layer_rules(spec.quant.layer_bits),
    ).bits

    def fitted(layers: Sequence[Layer]) -> dict[str, int]:
        return fit(graph, layers, limit, given, info.act_bits, other_bytes)

    fitted(_alike(graph))  # what nothing keeps is refused before the game
    found = fitted(measure_on_images(*play_short(spec, batch_size, function)))
    default = info.mixed({}).bits_by_name(graph)
    return {name: bits for name, bits in found.items() if bits != default[name]}
