"""The configurations that are measured."""

from ml_collections import ConfigDict

from adadfq_jax import config
from adadfq_jax.jobs import command_line


def load_config(text: str) -> ConfigDict:
    """Return the configuration of 'NAME[:argument]' or 'FILE[:argument]'."""
    file, _, argument = text.partition(":")
    return command_line.config_file(file).get_config(argument or None)


def default_configs() -> list[str]:
    """Return the names of the packaged configurations that name P's network."""
    return [name for name in config.names() if name != "any"]
