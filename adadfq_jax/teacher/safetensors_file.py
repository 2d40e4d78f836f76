"""Reading safetensors files as numpy arrays, except types that numpy does not have."""

from pathlib import Path

import numpy as np

from adadfq_jax.errors import InputError, short

# The types of numbers that can be read, by the format's names.
READ = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the arrays of a file, by name, and its metadata.

    Raises:
      InputError: the file is damaged, or has numbers of a type that cannot be read.
        The message does not contain the path.
    """
    import safetensors  # here: a game runs without it

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
        f"{short(name)} is of type {types[name]}, which cannot be read; save it as one"
        f" of {', '.join(READ)}"
    )
