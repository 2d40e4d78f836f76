"""The members of a population: parsing `config.population`, and each member's spec."""

import ast
from collections.abc import Callable
from typing import Any, NamedTuple

from adadfq_jax import settings
from adadfq_jax.errors import InputError
from adadfq_jax.training.spec import RunSpec

# The keys in which members may differ, and the types of their values.
KEYS: dict[str, Callable[[Any], Any]] = {
    "seed": int,
    **{f"game.{key}": float for key in settings.LOSS_SETTINGS},
    "game.g_rate": float,
    "game.q_rate": float,
}


class Member(NamedTuple):
    """A member of a population: its name, and its values of the keys that differ."""

    name: str
    values: dict[str, Any]


def parse(text: str) -> list[Member]:
    """Parse 'KEY=VALUE,VALUE KEY=VALUE,VALUE'; the first member has the first values.

    A member is named after its values: 'seed=0,1 game.lambda_l=0.1,0.3' makes
    seed-0_lambda_l-0.1 and seed-1_lambda_l-0.3.

    Raises:
      InputError: the text does not have this form, a key is not one of `KEYS`, the
        lists have unequal lengths, or two members are the same.
    """
    lists = dict(_parse_list(text, item) for item in text.split())
    if len(lists) < len(text.split()):
        raise _refusal(text, "a key is given twice")
    lengths = {key: len(values) for key, values in lists.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise _refusal(
            text,
            f"lists of unequal length ({counts}); member n takes the n-th value of each"
            " list",
        )
    members = []
    for values in zip(*lists.values(), strict=True):
        own = dict(zip(lists, values, strict=True))
        name = "_".join(f"{key.split('.')[-1]}-{own[key]!r}" for key in own)
        members.append(Member(name, own))
    if len(members) < 2:
        raise _refusal(text, "a population needs at least two members")
    names = [member.name for member in members]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise _refusal(text, f"{min(twice)} is there twice")
    return members


def _refusal(text: str, reason: str) -> InputError:
    return InputError(f"population={text!r}: {reason}")


def _parse_list(text: str, item: str) -> tuple[str, list[Any]]:
    """Parse 'KEY=VALUE,VALUE' into the key and its values."""
    key, equals, values = item.partition("=")
    if not equals:
        raise _refusal(
            text,
            f"{item!r} is not KEY=VALUE,VALUE, as in 'seed=0,1 game.lambda_l=0,0.2'",
        )
    if key not in KEYS:
        raise _refusal(
            text, f"members cannot differ in {key}, only in {', '.join(KEYS)}"
        )
    return key, [_parse_value(text, key, value) for value in values.split(",")]


def _parse_value(text: str, key: str, value: str) -> Any:
    kind = KEYS[key]
    try:
        number = ast.literal_eval(value)
        if type(number) in (int, float) and kind(number) == number:
            return kind(number)
    except (ValueError, SyntaxError, OverflowError):
        pass
    wanted = "a whole number" if kind is int else "a number"
    raise _refusal(text, f"{key}: {value!r} is not {wanted}")


def configure(spec: RunSpec, member: Member) -> RunSpec:
    """Return the spec of a member's run, as if it were trained alone.

    Raises:
      InputError: the member's values are not valid.
    """
    try:
        return spec.replace({"population": "", **member.values})
    except InputError as error:
        raise InputError(f"member {member.name}: {error}", *error.arguments) from error
