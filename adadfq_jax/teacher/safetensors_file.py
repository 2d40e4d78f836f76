"""Reads safetensors files as numpy arrays; what numpy has no type for is refused."""

from pathlib import Path

import numpy as np
import safetensors

from adadfq_jax.errors import InputError, short

# Types of numbers that are read, as the format calls them.
READ = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays by name, and the metadata.

    Raises:
      InputError: the file is damaged, or has numbers of another type; the message
        leaves out the path.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = list(file.keys())
            types = {name: file.get_slice(name).get_dtype() for name in names}
            others = [name for name in names if types[name] not in READ]
            if not others:
                arrays = {name: file.get_tensor(name) for name in names}
                return arrays, dict(file.metadata() or {})
    except (safetensors.SafetensorError, LookupError, OSError, ValueError) as error:
        raise InputError(
            f"not a readable safetensors file ({short(str(error), 300)})"
        ) from error
    name = others[0]
    raise InputError(
        f"{short(name)} is of type {types[name]}, read are {', '.join(READ)}: save it"
        " as one of these, as F32"
    )
