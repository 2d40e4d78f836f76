"""Small networks of many families, unmodified as their users write them.

`FAMILIES` has a maker of (function, variables) for each, and what is to be found in it.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

IMAGE = (16, 16, 3)

FAMILIES: dict[str, tuple[Callable[[], Any], Any]] = {}

NORM = functools.partial(nn.BatchNorm, use_running_average=True)


def family(kernels, activations, batch_norms, share, blocks=None, layout="NHWC"):
    """Registers a maker of (function, variables) and what is to be found."""

    def register(make):
        expected = kernels, activations, batch_norms, share, blocks, layout
        FAMILIES[make.__name__] = make, expected
        return make

    return register


def random_like(tree):
    """Values that are good for anything, variances included."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        statistic = any(str(getattr(k, "key", k)) in ("var", "scale") for k in path)
        low, high = (0.5, 1.5) if statistic else (-0.4, 0.4)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def linen(module, **arguments):
    """A Linen module as users bind it: a lambda with `train` and what else it takes."""
    init = functools.partial(module.init, **arguments)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *IMAGE)))
    return lambda v, x: module.apply(v, x, **arguments), random_like(shapes)


def layers(*parts):
    """Linen layers one after the other, global average pooling and a classifier."""
    return linen(nn.Sequential([*parts, lambda x: x.mean((1, 2)), nn.Dense(5)]))


def images_of(count, layout="NHWC"):
    rng = np.random.default_rng(count)
    x = jnp.asarray(rng.normal(size=(count, *IMAGE)), jnp.float32)
    return x if layout == "NHWC" else x.transpose(0, 3, 1, 2)


# Residual networks and blocks.


class ResNet(nn.Module):
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=True):
        kind = nn.remat(Basic, static_argnums=(2,)) if self.remat else Basic
        x = nn.Conv(8, (3, 3), use_bias=False, dtype=self.dtype)(x)
        norm = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)
        x = nn.max_pool(nn.relu(norm(x)), (3, 3), (2, 2), "SAME")
        for width, stride in ((8, 1), (16, 2), (16, 1)):
            x = kind(width, stride, self.dtype)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(5, dtype=self.dtype)(x)


class Basic(nn.Module):
    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x, train=True):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, dtype=self.dtype
        )
        strides = (self.stride, self.stride)
        y = nn.relu(norm()(conv(self.width, (3, 3), strides)(x)))
        y = norm(scale_init=nn.initializers.zeros_init())(conv(self.width, (3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv(self.width, (1, 1), strides)(x))
        return nn.relu(x + y)


@family(9, 7, 8, 0.7875, blocks=5)
def resnet():
    return linen(ResNet(), train=False)


@family(9, 7, 8, 0.7875, blocks=5)
def remat():
    return linen(ResNet(remat=True), train=False)


@family(9, 7, 8, 0.7875, blocks=5)
def bfloat16():
    return linen(ResNet(dtype=jnp.bfloat16), train=False)


@family(5, 4, 0, 0.8889)
def group_and_layer_norm():
    return layers(
        *(nn.Conv(8, (3, 3)), nn.GroupNorm(4), nn.relu),
        *(nn.Conv(8, (3, 3)), nn.LayerNorm(), nn.gelu),
        *(nn.Conv(8, (3, 3)), nn.LayerNorm()),  # no nonlinearity but its own
        *(nn.Conv(8, (3, 3)), nn.InstanceNorm(), nn.relu),
    )


@family(5, 4, 1, 0.7274)
def squeeze_and_excitation():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(NORM()(nn.Conv(8, (3, 3))(x)))
            gate = nn.relu(nn.Conv(2, (1, 1))(x.mean((1, 2), keepdims=True)))
            x = x * nn.sigmoid(nn.Conv(8, (1, 1))(gate))
            x = nn.hard_swish(nn.Conv(8, (3, 3))(x))
            return nn.Dense(5)(nn.relu6(x).mean((1, 2)))

    return linen(Net())


# Nonlinearities. Each is one activation, however it is written.

NONLINEARITIES = {
    "silu": nn.silu,
    "hard_swish": nn.hard_swish,
    "gelu": nn.gelu,
    "exact_gelu": functools.partial(nn.gelu, approximate=False),
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "selu": nn.selu,
    "celu": nn.celu,
    "softplus": nn.softplus,
    "hard_tanh": nn.hard_tanh,
    "tanh": jnp.tanh,
    "mish": jax.nn.mish,
    "squareplus": jax.nn.squareplus,
    "squared relu": lambda x: nn.relu(x) ** 2,
    "relu6": nn.relu6,
    "clip": lambda x: jnp.clip(x, 0, 1),
    "by abs": lambda x: 0.6 * x + 0.4 * jnp.abs(x),
    "by max and min": lambda x: jnp.maximum(x, 0) + 0.1 * jnp.minimum(x, 0),
    "of two relus": lambda x: nn.relu(x) - 0.1 * nn.relu(-x),
    "reciprocal": lambda x: 1 / (1 + jnp.exp(-x)),
    "of a reciprocal": lambda x: 2.0 / (x + 100.0),
    "glu": lambda x: x * nn.sigmoid(x[..., ::-1]),
    "rounded": lambda x: x.astype(jnp.int32).astype(jnp.float32),
    "where": lambda x: jnp.where(x > 0, x, 0.2 * x),
}


@family(2, 1, 1, 0.0007)
def prelu():
    return layers(nn.Conv(8, (3, 3)), NORM(), nn.PReLU())


# Kinds of convolutions and pools.


@family(6, 5, 2, 0.8974)
def grouped_dilated_depthwise_transposed():
    return layers(
        *(nn.Conv(8, (3, 3), strides=2), NORM(), nn.relu),
        *(nn.Conv(8, (3, 3), feature_group_count=4), nn.relu),
        *(nn.Conv(8, (3, 3), kernel_dilation=2), nn.relu),
        *(nn.Conv(16, (3, 3), feature_group_count=8), NORM(), nn.relu),
        *(nn.ConvTranspose(4, (4, 4), strides=(2, 2)), nn.relu),
    )


@family(4, 3, 0, 0.4548)
def pools():
    return layers(
        *(nn.Conv(8, (3, 3)), nn.relu, lambda x: nn.max_pool(x, (2, 2), (2, 2))),
        *(nn.Conv(8, (3, 3)), nn.relu),
        lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False),
        *(nn.Conv(8, (3, 3)), nn.relu),
        lambda x: jnp.max(x, (1, 2), keepdims=True),
    )


# Concatenations.


@family(5, 4, 4, 0.8572)
def densenet():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3))(x)
            for _ in range(3):
                y = nn.Conv(4, (3, 3))(nn.relu(NORM()(x)))
                x = jnp.concatenate([x, y], -1)
            return nn.Dense(5)(nn.relu(NORM()(x)).mean((1, 2)))

    return linen(Net())


@family(8, 7, 0, 0.7498)
def squeezenet():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
            for _ in range(2):
                x = nn.relu(nn.Conv(4, (1, 1))(x))
                expands = [nn.relu(nn.Conv(8, (k, k))(x)) for k in (1, 3)]
                x = nn.max_pool(jnp.concatenate(expands, -1), (2, 2))
            return nn.Dense(5)(nn.Dropout(0.5, deterministic=True)(x).mean((1, 2)))

    return linen(Net())


@family(6, 4, 4, 0.3336)  # depthwise convolutions are linear there
def shufflenet():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(NORM()(nn.Conv(8, (3, 3))(x)))
            left, y = jnp.split(x, 2, axis=-1)
            y = nn.relu(NORM()(nn.Conv(4, (1, 1))(y)))
            y = NORM()(nn.Conv(4, (3, 3), feature_group_count=4)(y))
            y = nn.relu(NORM()(nn.Conv(4, (1, 1))(y)))
            x = jnp.concatenate([left, y], -1)
            b, h, w, c = x.shape
            x = x.reshape(b, h, w, 2, c // 2).swapaxes(3, 4).reshape(b, h, w, c)
            x = nn.relu(nn.Conv(8, (1, 1))(x))
            return nn.Dense(5)(x.mean((1, 2)))

    return linen(Net())


@family(4, 2, 0, 0.729)
def two_classifiers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), strides=4)(x))
            y = nn.relu(nn.Conv(8, (3, 3))(x))
            return nn.Dense(5)(x.mean((1, 2))) + nn.Dense(5)(y.max((1, 2)))

    return linen(Net())


# Kernels that are computed from variables.


@family(3, 2, 0, 0.7273)
def weight_standardisation():
    class Standardised(nn.Module):
        @nn.compact
        def __call__(self, x):
            shape = (3, 3, x.shape[-1], 8)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
            gain = self.param("gain", nn.initializers.ones, (8,))
            mean, var = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
            kernel = (kernel - mean) * lax.rsqrt(var + 1e-4) * gain
            numbers = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=numbers
            )

    return layers(Standardised(), nn.relu, Standardised(), nn.relu)


@family(3, 2, 0, 0.7273)
def linen_weight_norm():
    norm = nn.WeightNorm
    return layers(norm(nn.Conv(8, (3, 3))), nn.relu, norm(nn.Conv(8, (3, 3))), nn.relu)


def spectral_norm_of(kernel, u):
    """As libraries do it: a step of the power iteration, then the largest value."""
    flat = kernel.reshape(-1, kernel.shape[-1])

    def step(_, u):
        v = flat @ u
        u = flat.T @ (v / jnp.linalg.norm(v))
        return u / jnp.linalg.norm(u)

    u = lax.stop_gradient(lax.fori_loop(0, 2, step, u))
    return kernel / jnp.linalg.norm(flat @ u)


@family(3, 2, 0, 0.7273)
def spectral_norm():
    def network(v, x):
        for layer in (v["first"], v["second"]):
            kernel = spectral_norm_of(layer["kernel"], layer["u"])
            x = jax.nn.relu(conv(x, kernel))
        return x.mean((1, 2)) @ v["head"]

    first, second = ({"kernel": ones(3, 3, n, 8), "u": ones(8)} for n in (3, 8))
    return network, random_like({"first": first, "second": second, "head": ones(8, 5)})


@family(3, 2, 0, 0.5002)
def one_kernel_twice():
    def network(v, x):
        x = jax.nn.relu(conv(x, v["k"]))
        return jax.nn.relu(conv(x, v["k"])).mean((1, 2)) @ v["w"]

    return network, random_like({"k": ones(3, 3, 3, 3), "w": ones(3, 5)})


@family(2, 1, 0, 0.0005)
def constant_blur():
    blur = np.full((3, 3, 1, 8), 1 / 9, np.float32)

    def network(v, x):
        x = jax.nn.relu(conv(x, v["k"]))
        return conv(x, blur, groups=8).mean((1, 2)) @ v["w"]

    return network, random_like({"k": ones(3, 3, 3, 8), "w": ones(8, 5)})


def ones(*shape):
    return jnp.ones(shape)


def conv(x, kernel, numbers=("NHWC", "HWIO", "NHWC"), groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=numbers,
        feature_group_count=groups,
    )


# Functions over trees of their own, other layouts, other libraries.


@family(3, 2, 2, 0.7273)
def bare_function():
    def network(theta, x):
        for w, (mu, nu, gamma, beta) in zip(theta["W"], theta["stats"], strict=True):
            x = conv(x, w)
            x = gamma * (x - mu) / jnp.sqrt(nu + 1e-5) + beta
            x = x * (x > 0)
        return jnp.einsum("bhwc,ck->bk", x, theta["out"]) / 256

    rng = np.random.default_rng(0)
    stats = [tuple(rng.uniform(0.5, 1.5, (4, 8)).astype(np.float32)) for _ in range(2)]
    kernels = [ones(3, 3, 3, 8), ones(3, 3, 8, 8)]
    return network, {
        **random_like({"W": kernels, "out": ones(8, 5)}),
        "stats": stats,
    }


def keras_norm(x, mean, variance, gamma, beta):
    """As Keras 3 has it on JAX: multiplied out."""
    shape = (1, 1, 1, -1)
    mean, variance = mean.reshape(shape), variance.reshape(shape)
    inverse = lax.rsqrt(variance + 1e-3) * gamma.reshape(shape)
    return x * inverse + (-mean * inverse + beta.reshape(shape))


NORMS = {
    "keras": keras_norm,
    "scale first": lambda x, m, v, g, b: (x - m) * g * lax.rsqrt(v + 1e-5) + b,
    "one over": lambda x, m, v, g, b: (x - m) * (g * (1 / jnp.sqrt(v + 1e-5))) + b,
    "power": lambda x, m, v, g, b: (x - m) * (v + 1e-5) ** -0.5 * g + b,
    "divided": lambda x, m, v, g, b: g * (x - m) / jnp.sqrt(1e-5 + v) + b,
    "over power": lambda x, m, v, g, b: (x - m) / (v + 1e-5) ** 0.5,
    "multiplied out": lambda x, m, v, g, b: (
        x * (g / jnp.sqrt(v + 1e-5)) + (b - m * (g / jnp.sqrt(v + 1e-5)))
    ),
    "scaled before": lambda x, m, v, g, b: (
        x * g * lax.rsqrt(v + 1e-5) + (b - m * (g * lax.rsqrt(v + 1e-5)))
    ),
    "minus": lambda x, m, v, g, b: (
        x * lax.rsqrt(v + 1e-5) * g - m * (lax.rsqrt(v + 1e-5) * g)
    ),
    "broadcast": lambda x, m, v, g, b: (
        (x - jnp.broadcast_to(m, x.shape))
        / jnp.sqrt(jnp.broadcast_to(v, x.shape) + 1e-5)
    ),
    "standardize": lambda x, m, v, g, b: jax.nn.standardize(x, mean=m, variance=v),
    "epsilon of the file": lambda x, m, v, g, b: (x - m) * lax.rsqrt(v + g[:1] ** 2),
    "jitted": jax.jit(lambda x, m, v, g, b: (x - m) * lax.rsqrt(v + 1e-5) * g),
}

NO_NORMS = {
    "group": lambda x, m, v, g, b: (
        (x - x.mean((1, 2, 3), keepdims=True))
        * lax.rsqrt(x.var((1, 2, 3), keepdims=True) + 1e-5)
        * g
        + b
    ),
    "constants": lambda x, m, v, g, b: (x - 0.5) / jnp.sqrt(0.2 + 1e-5),
    "deviation": lambda x, m, v, g, b: (x - m) / v,
    "inverse of a deviation": lambda x, m, v, g, b: (x - m) * (v + 1e-5) ** -1,
    "undone": lambda x, m, v, g, b: (x - m) * jnp.sqrt(v + 1e-5),
    "undone by a division": lambda x, m, v, g, b: (x - m) / lax.rsqrt(v + 1e-5),
    "one variance": lambda x, m, v, g, b: (x - m) * lax.rsqrt(v[0] + 1e-5),
    "affine": lambda x, m, v, g, b: x * lax.rsqrt(v + 1e-5) + b,
}


def with_norm(norm):
    def network(v, x):
        x = norm(conv(x, v["k"]), *(v[name] for name in ("m", "v", "g", "b")))
        return jax.nn.relu(x).mean((1, 2)) @ v["w"]

    rng = np.random.default_rng(0)
    vectors = {name: rng.uniform(0.5, 1.5, 8).astype(np.float32) for name in "mvgb"}
    variables = random_like({"k": ones(3, 3, 3, 8), "w": ones(8, 5)}) | vectors
    return network, variables


@family(3, 2, 1, 0.7273, layout="NCHW")
def channels_first():
    def network(v, x):
        numbers = ("NCHW", "OIHW", "NCHW")
        x = conv(x, v["conv1.weight"], numbers)
        mean, var = (v[f"bn1.running_{s}"][:, None, None] for s in ("mean", "var"))
        x = jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5))
        x = jax.nn.relu(conv(x, v["conv2.weight"], numbers))
        return x.mean((2, 3)) @ v["fc.weight"].T

    kernels = {"conv1.weight": ones(8, 3, 3, 3), "conv2.weight": ones(8, 8, 3, 3)}
    variables = random_like({**kernels, "fc.weight": ones(5, 8)})
    statistics = {"bn1.running_mean": ones(8), "bn1.running_var": 2 * ones(8)}
    return network, variables | statistics


@family(3, 2, 0, 0.0013)
def block_diagonal():
    def network(v, x):
        x = jax.nn.relu(conv(x, v["k"])).mean((1, 2)).reshape(x.shape[0], 2, 4)
        x = jax.nn.relu(jnp.einsum("bgi,gio->bgo", x, v["g"]))
        return x.reshape(x.shape[0], -1) @ v["w"]

    shapes = {"k": ones(3, 3, 3, 8), "g": ones(2, 4, 4), "w": ones(8, 5)}
    return network, random_like(shapes)


@family(3, 2, 1, 0.0037, layout="NCHW")
def vmapped():
    """As Equinox has it: a network of one example, the kernels on the left."""

    def one(v, x):
        x = conv(x[None], v["conv"], ("NCHW", "OIHW", "NCHW"))[0]
        mean, var = v["norm"]["mean"], v["norm"]["var"]
        x = jax.vmap(lambda y, m, s: (y - m) / jnp.sqrt(s + 1e-5))(x, mean, var)
        x = jax.nn.relu(x).mean((1, 2))
        return v["last"] @ jax.nn.relu(v["hidden"] @ x)

    variables = {"conv": ones(8, 3, 3, 3), "hidden": ones(16, 8), "last": ones(5, 16)}
    variables["norm"] = {"mean": ones(8), "var": ones(8)}
    return lambda v, x: jax.vmap(one, (None, 0))(v, x), random_like(variables)


@family(3, 2, 1, 0.0004, layout="NCHW")
def vmapped_with_a_norm_between_products():
    """The batch is no axis in particular where the batch norm is."""

    def one(v, x):
        x = conv(x[None], v["conv"], ("NCHW", "OIHW", "NCHW"))[0]
        x = v["hidden"] @ jax.nn.relu(x).mean((1, 2))
        x = (x - v["mean"]) * lax.rsqrt(v["var"] + 1e-5)
        return jax.nn.log_softmax(v["last"] @ jax.nn.relu(x))

    variables = {"conv": ones(8, 3, 3, 3), "hidden": ones(2, 8), "last": ones(2, 2)}
    variables |= {"mean": ones(2), "var": ones(2)}
    return lambda v, x: jax.vmap(functools.partial(one, v))(x), random_like(variables)


@family(4, 3, 2, 0.4014)
def flax_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.bn1 = nnx.BatchNorm(8, rngs=rngs)
            self.conv2 = nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs)
            self.bn2 = nnx.BatchNorm(8, rngs=rngs)
            self.hidden = nnx.Linear(8, 16, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(16, 5, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.bn1(self.conv1(x)))
            x = nnx.relu(self.bn2(self.conv2(x))).mean((1, 2))
            return self.head(self.dropout(nnx.relu(self.hidden(x))))

    model = Net(nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    return lambda state, x: nnx.merge(graphdef, state)(x), random_like(state)


@family(3, 2, 1, 0.0037, layout="NCHW")
def equinox():
    import equinox as eqx

    class Net(eqx.Module):
        conv: Any
        norm: Any
        mlp: Any

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=key)
            self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="ema")
            self.mlp = eqx.nn.MLP(8, 5, 16, 1, key=key)

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            return self.mlp(jax.nn.relu(x).mean((1, 2))), state

    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    model = eqx.nn.inference_mode(model)
    arrays, static = eqx.partition((model, state), eqx.is_array)

    def network(arrays, images):
        model, state = eqx.combine(arrays, static)
        apply = jax.vmap(model, (0, None), (0, None), axis_name="batch")
        return apply(images, state)[0]

    return network, arrays


# Attention, and what stays in float.


@family(6, 2, 0, 0.2165)
def attention():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (4, 4), strides=4)(x).reshape(x.shape[0], -1, 8)
            x = x + nn.SelfAttention(2)(nn.LayerNorm()(x))
            return nn.Dense(5)(nn.gelu(x.mean(1)))

    return linen(Net())


# Ends of networks.


@family(2, 1, 0, 0.0007)
def log_softmax():
    return linen(Ending(nn.log_softmax))


class Ending(nn.Module):
    ending: Callable[[Any], Any]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, logits=False):
        x = nn.relu(nn.Conv(8, (3, 3), dtype=self.dtype)(x)).mean((1, 2))
        x = nn.Dense(5, dtype=self.dtype)(x)
        return x if logits else self.ending(x)


ENDINGS = {
    "softmax": nn.softmax,
    "in float32": lambda x: nn.softmax(x).astype(jnp.float32),
    "by hand, shifted": lambda x: (
        (e := jnp.exp(x - x.max(1, keepdims=True))) / e.sum(1)[:, None]
    ),
    "reshaped": lambda x: nn.softmax(x).reshape(x.shape[0], -1),
    "axis of its own": lambda x: nn.softmax(x[:, None, None, :])[:, 0, 0],
}

# Functions with a derivative of their own.


@jax.custom_vjp
def own_conv(x, kernel):
    return conv(x, kernel)


own_conv.defvjp(
    lambda x, kernel: (conv(x, kernel), (x, kernel)),
    lambda kept, out: jax.vjp(conv, *kept)[1](out),
)


@jax.custom_vjp
def clipped_gradient(x):
    return x


clipped_gradient.defvjp(lambda x: (x, None), lambda _, out: (jnp.clip(out, -1, 1),))


@jax.custom_vjp
def own_norm(x, mean, var):
    return (x - mean) * lax.rsqrt(var + 1e-5)


own_norm.defvjp(
    lambda x, mean, var: (own_norm(x, mean, var), var),
    lambda var, out: (out * lax.rsqrt(var + 1e-5), None, None),
)


@jax.custom_jvp
def own_relu(x):
    return x * (x > 0)


own_relu.defjvps(lambda dx, y, x: dx * (x > 0))


@family(3, 2, 1, 0.7273)
def derivatives_of_their_own():
    def network(v, x):
        x = own_norm(own_conv(x, v["k"]), v["mean"], v["var"])
        x = clipped_gradient(own_relu(clipped_gradient(x)))
        x = checkpoint_name(x, "features")
        x = jax.nn.relu(own_conv(lax.optimization_barrier((x, x))[1], v["k2"]))
        return x.mean((1, 2)) @ v["w"]

    shapes = {"k": ones(3, 3, 3, 8), "k2": ones(3, 3, 8, 8), "w": ones(8, 5)}
    variables = random_like(shapes) | {"mean": ones(8), "var": ones(8)}
    return network, variables
