"""`adadfq_jax.quantize`: networks from outside the package."""

import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adadfq_jax
from adadfq_jax import api, recipes
from adadfq_jax.errors import InputError
from adadfq_jax.models import layers
from tests.own_networks import SHAPE, Small

QUICK = {"devices": 1, "game.generator_channels": 8}


def quadrants(rng, count):
    """Noise with one of four bright quadrants, which is the class."""
    labels = rng.integers(0, 4, count)
    images = rng.normal(size=(count, *SHAPE)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        row, column = 8 * (label // 2), 8 * (label % 2)
        image[row : row + 8, column : column + 8] += 1.5
    return images / 1.3, labels


@pytest.fixture(scope="module")
def trained():
    """A `Small` that tells quadrants apart."""
    model, rng = Small(), np.random.default_rng(0)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(variables, opt_state, images, labels):
        def loss(params):
            logits, moved = model.apply(
                {**variables, "params": params}, images, True, mutable=["batch_stats"]
            )
            ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return ce.mean(), moved["batch_stats"]

        grads, batch_stats = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": batch_stats}, opt_state

    opt_state = optimizer.init(variables["params"])
    for _ in range(60):
        variables, opt_state = update(variables, opt_state, *quadrants(rng, 64))
    return model, variables


def test_a_trained_network_keeps_its_answers(trained):
    model, variables = trained
    precision = jax.config.jax_default_matmul_precision
    network = adadfq_jax.quantize(
        model,
        variables,
        image_shape=SHAPE,
        weight_bits=np.int64(5),
        act_bits=np.int32(5),
        steps=np.int64(40),
        seed=np.uint8(0),
        recipe="adadfq_short",  # quick to compile
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.2),
        settings=QUICK,
    )
    assert jax.config.jax_default_matmul_precision == precision
    assert network.path is None
    assert network.mean == (0.5, 0.4, 0.3)
    images, labels = quadrants(np.random.default_rng(9), 400)
    p, q = (np.argmax(f(images), -1) for f in (bind(model, variables), network))
    assert (p == labels).mean() > 0.95
    assert (p == q).mean() > 0.9
    assert network.info.model == "Small" and network.num_classes == 4
    assert "4 kernels" not in str(network.graph)  # three, of which two have an input
    assert list(network.ranges) == ["Conv_1.kernel:input", "Dense_0.kernel:input"]


def bind(model, variables):
    return jax.jit(lambda images: model.apply(variables, images))


class NoKernel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.mean(nn.relu(layers.BatchNorm()(x)), (1, 2))


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(jnp.mean(x, (1, 2)))


class Training(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(4)(jnp.mean(x, (1, 2)))


class NeedsMore(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return Trains()(x, train)


class Trains(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(4)(nn.relu(x).mean((1, 2)))


class Drops(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(4)(nn.relu(x).mean((1, 2)))


class NeedsMoreOfNnx(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x, train):
        return nnx.relu(self.layer(x.mean((1, 2))))


class OfOneImage(eqx.Module):
    first: Any
    last: Any

    def __init__(self):
        self.first = eqx.nn.Conv2d(3, 8, 3, key=jax.random.key(0))
        self.last = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(1))

    def __call__(self, x):
        return self.last(jax.nn.relu(self.first(x)).mean((1, 2)))


class WithAState(OfOneImage):
    def __call__(self, x, state):
        return super().__call__(x), state


class TakesAnything(eqx.Module):
    kernel: Any

    def __call__(self, x):
        return self.kernel @ jax.nn.relu(self.kernel @ x.reshape(-1)[:4])


LINEN = r"lambda variables, images: module\.apply\(variables, images, train=False\)"
VMAP = r"lambda arrays, images: jax\.vmap\(eqx\.combine\(arrays, static\)\)\(images\)"


def fresh(model, *others):
    return model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), *others)


@pytest.mark.parametrize(
    ("model", "others", "message"),
    [
        ("resnet20", (), "network: str cannot be called"),
        (NoKernel(), (), "no kernel, that is, no convolution or product"),
        (Linear(), (), "no nonlinearity comes before a convolution"),
        (Training(), (), r"(cannot be applied|images of a batch)"),
        (NeedsMore(), (True,), f"NeedsMore takes train beside the images; .*{LINEN}"),
        (Trains(), (False,), f"cannot be applied to a batch .*{LINEN}"),
        (Drops(), (False,), f"cannot be applied to a batch .*{LINEN}"),
        (Small, (), r"Small is a class; give an instance, Small\(\.\.\.\)"),
    ],
)
def test_networks_that_cannot_be_quantized(model, others, message):
    variables = fresh(model, *others) if isinstance(model, nn.Module) else None
    with pytest.raises(InputError, match=message):
        adadfq_jax.quantize(model, variables, image_shape=SHAPE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (NeedsMoreOfNnx(nnx.Rngs(0)), r"takes train beside .*nnx\.split\(model\)"),
        (OfOneImage(), rf"cannot be applied to a batch .*rank 3.*{VMAP}"),
        (
            WithAState(),
            f"WithAState takes state beside the images; .*{VMAP}.*own-network",
        ),
        (TakesAnything(jnp.ones((4, 4))), r"output is \(4,\) for .*jax\.vmap"),
        (OfOneImage, "OfOneImage is a class; give an instance"),
    ],
)
def test_a_module_that_cannot_be_given_alone_is_told_how(model, message):
    with pytest.raises(InputError, match=message) as caught:
        adadfq_jax.trace(model, image_shape=SHAPE, layout="NCHW")
    assert "\n" not in str(caught.value)


def test_what_the_refusals_say_to_give_can_be_given():
    model = NeedsMore()
    graph = adadfq_jax.trace(
        lambda variables, images: model.apply(variables, images, train=False),
        fresh(model, True),
        image_shape=SHAPE,
    )
    assert len(graph.kernels) == 2 and len(graph.batch_norms) == 1
    arrays, static = eqx.partition(OfOneImage(), eqx.is_array)
    graph = adadfq_jax.trace(
        lambda arrays, images: jax.vmap(eqx.combine(arrays, static))(images),
        arrays,
        image_shape=SHAPE,
        layout="NCHW",
    )
    assert len(graph.kernels) == 3
    definition, state = nnx.split(NeedsMoreOfNnx(nnx.Rngs(0)))
    with pytest.raises(InputError, match="no nonlinearity comes before"):
        adadfq_jax.trace(
            lambda state, images: nnx.merge(definition, state)(images, train=False),
            state,
            image_shape=SHAPE,
        )


def test_a_network_without_batch_norms_is_trained_with_a_warning(capsys):
    model = nn.Sequential(
        [nn.Conv(4, (3, 3)), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(4)]
    )
    network = adadfq_jax.quantize(
        model,
        fresh(model),
        image_shape=SHAPE,
        steps=3,
        recipe="adadfq_short",
        settings=QUICK,
    )
    warning = "no batch norm, so that G learns from margin, disagreement, agreement"
    assert warning in capsys.readouterr().out
    assert len(network.kernels) == 2


@pytest.mark.parametrize(
    ("bits", "schedule"),
    [(3, (10, 15, (10, 20))), (4, (10, 10, (30,))), (5, (10, 20, ()))],
)
def test_a_schedule_by_bits_is_stretched(monkeypatch, bits, schedule):
    monkeypatch.setattr(api, "_quantize_in_memory", lambda spec, function: spec)
    mine = recipes.get("adadfq_short").adding(
        warmup_steps=recipes.ByBits(150, 100, 200),
        observe_steps=100,
        rate_drops=recipes.ByBits((100, 200), (300,), ()),
    )
    spec = adadfq_jax.quantize(
        *(Small(), fresh(Small())),
        image_shape=SHAPE,
        weight_bits=bits,
        steps=100,
        recipe=mine,
        settings=QUICK,
    )
    game = spec.game
    assert game.steps == 100
    assert (game.observe_steps, game.warmup_steps, game.rate_drops) == schedule


def changed(variables, path, value):
    """A copy with one leaf replaced, or taken out for None."""
    flat = {
        ".".join(k.key for k in p): v for p, v in jax.tree.leaves_with_path(variables)
    }
    flat.pop(path, None)
    if value is not None:
        flat[path] = value
    tree = {}
    for name, leaf in flat.items():
        *above, last = name.split(".")
        node = functools.reduce(lambda t, k: t.setdefault(k, {}), above, tree)
        node[last] = leaf
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("params.Dense_0.bias", None, "cannot be applied"),
        ("params.Dense_0.bias", np.zeros(5), "cannot be applied"),
        ("params.Dense_0.bias", np.full(4, np.nan), "not finite"),
        ("params.Dense_0.bias", "zeros", "Dense_0.bias is no array but a str"),
        ("batch_stats.norm.var", np.full(8, -1.0), "var has variances below 0"),
    ],
)
def test_variables_that_do_not_fit(trained, path, value, message):
    model, variables = trained
    spoilt = changed(variables, path, value)
    with pytest.raises(InputError, match=f"variables: .*{message}|{message}"):
        adadfq_jax.quantize(model, spoilt, image_shape=SHAPE, num_classes=4)


def test_variables_must_be_there(trained):
    model, _ = trained
    with pytest.raises(InputError, match="variables=None: Small is a Linen module"):
        adadfq_jax.quantize(model, image_shape=SHAPE)


NO_STEPS = recipes.Recipe({}, {}, {}, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": (0, 16, 3)}, "H, W, channels"),
        ({"layout": "HWC"}, "layout='HWC': must be NHWC or NCHW"),
        ({"image_shape": (16, 16)}, "height, width, channels"),
        ({"image_shape": None}, "image_shape=None: must be"),
        ({"image_shape": "16x16"}, "image_shape='16x16': must be"),
        ({"image_shape": 16}, "image_shape=16: must be"),
        ({"image_shape": (16, 16, 3.5)}, "image_shape=.*must be"),
        ({"num_classes": "4"}, "num_classes='4': must be a whole number"),
        ({"mean": 0.5}, "mean=0.5: must be 3 numbers, one per channel"),
        ({"mean": "abc"}, "mean='abc': must be 3 numbers"),
        ({"mean": "123"}, "mean='123': must be 3 numbers"),
        ({"mean": (0.5, None, 0.5)}, "mean=.*must be 3 numbers"),
        ({"mean": (0.5,) * 3}, "mean without std: give both, or neither"),
        ({"std": (0.5,) * 3}, "std without mean: give both, or neither"),
        ({"std": (1.0, 1.0, float("nan"))}, "std=.*must be 3 numbers"),
        ({"steps": "10"}, "steps='10': must be a whole number"),
        ({"steps": float("nan")}, "steps=nan: must be a whole number"),
        ({"recipe": ["adadfq"]}, r"recipe=\['adadfq'\]: must be a name"),
        ({"settings": [1]}, r"settings=\[1\]: must be"),
        ({"settings": {1: 2}}, "settings=1: must be"),
        ({"seed": 2**70}, r"seed=.*must be 0 to 2\*\*32 - 1"),
        ({"seed": "one"}, "seed='one': must be a whole number"),
        ({"workdir": 5}, "workdir=5: must be a path"),
        ({"name": 5}, "name=5: must be a text"),
        ({"num_classes": 5}, "num_classes=5: Small gives 4 logits"),
        ({"weight_bits": 1}, "weight_bits=1: must be 2 to 8"),
        ({"act_bits": 9}, "act_bits=9: must be 2 to 8"),
        ({"act_bits": 4.5}, "act_bits"),
        ({"recipe": "nope"}, "nope.*no such recipe"),
        ({"recipe": NO_STEPS, "steps": 5}, "steps=5: the recipe has no steps to scale"),
        ({"mean": (0.5,)}, "mean"),
        ({"settings": {"game.q_rat": 1}}, r"game\.q_rate"),
        ({"settings": {"quant": {"act_bits": 5}}}, "quant: no such setting"),
        (
            {"steps": 50, "settings": {"game.steps": 80}},
            "settings: 'game.steps' is the argument steps",
        ),
    ],
)
def test_arguments_that_cannot_be_used(trained, arguments, message):
    model, variables = trained
    arguments = {"image_shape": SHAPE, "num_classes": 4, **arguments}
    with pytest.raises(InputError, match=message):
        adadfq_jax.quantize(model, variables, **arguments)


@pytest.mark.parametrize(
    ("setting", "argument"),
    [
        ("recipe", "recipe"),
        ("seed", "seed"),
        ("teacher.model", "name"),
        ("teacher.image_shape", "image_shape"),
        ("teacher.num_classes", "num_classes"),
        ("teacher.mean", "mean"),
        ("teacher.std", "std"),
        ("teacher.layout", "layout"),
        ("quant.weight_bits", "weight_bits"),
        ("quant.act_bits", "act_bits"),
    ],
)
def test_a_setting_that_is_an_argument_is_refused(trained, setting, argument):
    model, variables = trained
    with pytest.raises(InputError) as caught:
        adadfq_jax.quantize(model, variables, image_shape=SHAPE, settings={setting: 5})
    assert str(caught.value) == f"settings: {setting!r} is the argument {argument}"


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        (
            "/dev/null/run",
            "/dev/null/run: Not a directory; correct that and start again",
        ),
        (
            "{tmp}/" + 300 * "n",
            "nnn.*: File name too long; correct that and start again",
        ),
        ("{tmp}/file", "file: File exists; correct that and start again"),
        ("{tmp}", "it has quantized.safetensors, but no identity.json"),
    ],
)
def test_a_workdir_that_cannot_be_used(trained, tmp_path, workdir, message):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "quantized.safetensors").write_text("precious")
    model, variables = trained
    with pytest.raises(InputError, match=f"{message}.*choose another workdir$"):
        adadfq_jax.quantize(
            model,
            variables,
            image_shape=SHAPE,
            workdir=workdir.format(tmp=tmp_path),
            settings=QUICK,
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "file",
        "quantized.safetensors",
    ]
