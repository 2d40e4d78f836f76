"""Which configurations are measured."""

from pathlib import Path

from ml_collections import ConfigDict

from adadfq_jax.errors import InputError
from adadfq_jax.jobs import command_line


def load_config(text: str) -> ConfigDict:
    """The configuration of 'FILE[:argument]'."""
    file, _, argument = text.partition(":")
    return command_line.config_file(file).get_config(argument or None)


def default_configs() -> list[str]:
    """Every file of configs/."""
    folder = Path(__file__).parents[2] / "configs"
    found = sorted(str(path) for path in folder.glob("*.py"))
    if not found:
        raise InputError("--config is needed: there is no folder configs/")
    return found
