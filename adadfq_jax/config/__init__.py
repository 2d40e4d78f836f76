"""Configurations: the keys with their defaults, and helpers for files in configs/."""

from adadfq_jax.config.keys import ASSETS as ASSETS
from adadfq_jax.config.keys import FOLDER as FOLDER
from adadfq_jax.config.keys import default_config as default_config
from adadfq_jax.config.keys import from_json as from_json
from adadfq_jax.config.keys import imagenet_config as imagenet_config
from adadfq_jax.config.keys import parse_argument as parse_argument
from adadfq_jax.config.keys import reference as reference
from adadfq_jax.config.keys import refuse_unknown_keys as refuse_unknown_keys
from adadfq_jax.config.packaged import load as load
from adadfq_jax.config.packaged import locate as locate
from adadfq_jax.config.packaged import names as names
