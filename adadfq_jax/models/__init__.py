"""Networks by name: `get_model(name, num_classes=...)`."""

from collections.abc import Callable

import flax.linen as nn

from adadfq_jax.errors import InputError
from adadfq_jax.layers import Identity
from adadfq_jax.models.resnet_cifar import ResNetCifar
from adadfq_jax.models.tiny import Tiny

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": ResNetCifar,
    "tiny": Tiny,
}


def names() -> list[str]:
    """Registered network names, sorted."""
    return sorted(_MODELS)


def get_model(
    name: str, *, num_classes: int, act_quant: Callable[..., nn.Module] = Identity
) -> nn.Module:
    """The network `name`, as P or as Q.

    Args:
      name: one of `names()`.
      num_classes: length of the logits.
      act_quant: makes the layer that follows every ReLU: `layers.Identity` for
        P, `functools.partial(layers.ActQuant, bits=...)` for Q.

    Returns:
      A Linen module, images [B, H, W, channels] -> logits [B, num_classes]. The
      trees of P and Q are the same; Q has the collection `ranges` besides.

    Raises:
      InputError: the name is not registered.
    """
    if name not in _MODELS:
        raise InputError(f"unknown network {name!r}; known are: {', '.join(names())}")
    return _MODELS[name](num_classes=num_classes, act_quant=act_quant)
