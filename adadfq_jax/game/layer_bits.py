"""Bits per layer: rules over the layers of a graph, resolved to bits by name.

A layer is a kernel with its operand, the activation that it reads. Its name is the
kernel's without a last '.kernel' or '.weight'. A rule is a regular expression that must
match the whole name of a layer or of its kernel. The last rule that matches decides.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from adadfq_jax import settings
from adadfq_jax.errors import InputError
from adadfq_jax.network import Graph
from adadfq_jax.settings import LayerRule


class Resolved(NamedTuple):
    """The bits that rules give to a graph.

    Attributes:
      bits: bits of the kernels and activations that differ from the bits of all others,
        by name.
      notes: sentences for the user on rules that are not followed as they stand.
    """

    bits: dict[str, int]
    notes: list[str]


def layer_of(kernel: str) -> str:
    """Return the name of a kernel's layer."""
    return re.sub(r"\.(kernel|weight)(?=#|$)", "", kernel)


def resolve(
    graph: Graph,
    weight_bits: int,
    act_bits: int,
    first_last_bits: int = 0,
    rules: Sequence[LayerRule] = (),
) -> Resolved:
    """Find the bits of every layer.

    An activation that several layers read has the most bits that one of them asks for.
    A layer to which no rule gives bits for its operand asks for `act_bits`.

    Args:
      graph: the traced network.
      weight_bits: bits of all other kernels.
      act_bits: bits of all other activations.
      first_last_bits: of the first and last kernel and of the last one's operand; 0
        gives them no bits of their own. The operand of the first is the image.
      rules: they come after the rules for the first and the last layer.

    Raises:
      InputError: a rule matches no layer.
    """
    asked: dict[str, dict[str, int]] = {"w": {}, "a": {}}  # by kernel
    if first_last_bits:
        ends = [graph.kernels[0].name, graph.kernels[-1].name]
        asked["w"] = dict.fromkeys(ends, first_last_bits)
        asked["a"] = {ends[-1]: first_last_bits}
    notes = []
    for rule in rules:
        matched = [entry for entry in graph.kernels if _matches(rule, entry.name)]
        if not matched:
            raise _no_match(rule, graph)
        names = [entry.name for entry in matched]
        if rule.weight_bits:
            asked["w"] |= dict.fromkeys(names, rule.weight_bits)
        if rule.act_bits:
            asked["a"] |= dict.fromkeys(names, rule.act_bits)
            if not any(entry.activation for entry in matched):
                notes.append(
                    f"quant.layer_bits: {rule.pattern!r} gives bits to operands, but"
                    " its layers read no quantized activation"
                )
    bits = {name: k for name, k in asked["w"].items() if k != weight_bits}
    for activation in graph.activations:
        wanted = {name: asked["a"].get(name, act_bits) for name in activation.readers}
        most = max(wanted.values(), default=act_bits)
        if most != act_bits:
            bits[activation.name] = most
        if len(set(wanted.values())) > 1:
            readers = ", ".join(f"{layer_of(n)} for {k}" for n, k in wanted.items())
            notes.append(
                f"{activation.name} has {most} bits, the most of those that its readers"
                f" ask for ({readers})"
            )
    return Resolved(bits, notes)


def _matches(rule: LayerRule, kernel: str) -> bool:
    names = (layer_of(kernel), kernel)
    return any(re.fullmatch(rule.pattern, name) for name in names)


def _no_match(rule: LayerRule, graph: Graph) -> InputError:
    names = [layer_of(entry.name) for entry in graph.kernels]
    like = difflib.get_close_matches(rule.pattern, names, n=3, cutoff=0)
    return InputError(
        f"quant.layer_bits: {rule.pattern!r} matches no layer; the nearest are"
        f" {', '.join(like)}",
        "quant.layer_bits",
    )


def by_layer(
    graph: Graph, weight_bits: int, act_bits: int, bits: Mapping[str, int]
) -> dict[str, str]:
    """Return 'W4A8' by layer, 'W4' for a layer whose operand is not quantized.

    Args:
      graph: the traced network.
      weight_bits: bits of the kernels that `bits` leaves out.
      act_bits: bits of the activations that it leaves out.
      bits: bits by name.
    """
    found = {}
    for entry in graph.kernels:
        label = f"W{bits.get(entry.name, weight_bits)}"
        if entry.activation:
            label += f"A{bits.get(entry.activation, act_bits)}"
        found[layer_of(entry.name)] = label
    return found


def in_words(
    graph: Graph, weight_bits: int, act_bits: int, bits: Mapping[str, int]
) -> str:
    """List the layers that have other bits, as in 'W8A8: output; W2: init_block.conv'.

    Args:
      graph: see `by_layer`.
      weight_bits: see `by_layer`.
      act_bits: see `by_layer`.
      bits: see `by_layer`.
    """
    groups: dict[str, list[str]] = {}
    usual = {f"W{weight_bits}", settings.bits_label(weight_bits, act_bits)}
    for layer, label in by_layer(graph, weight_bits, act_bits, bits).items():
        if label not in usual:
            groups.setdefault(label, []).append(layer)
    return "; ".join(f"{label}: {', '.join(groups[label])}" for label in sorted(groups))
