"""Measures games and reconstructions on a GPU or a TPU, within a budget of time.

    python -m adadfq_jax.benchmark --device --out=runs/device

It needs jax, flax, optax, numpy and ml_collections alone. P is drawn at random, except
for the reconstruction, whose P is the embedded ResNet-20. Cases that no longer fit into
the budget are named, and the same command measures them.
"""

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adadfq_jax import quant, teacher
from adadfq_jax.benchmark import device_tables, measure, profile
from adadfq_jax.benchmark.budget import Budget
from adadfq_jax.benchmark.device_tables import NUMBERS, REFERENCE
from adadfq_jax.errors import InputError, first_line
from adadfq_jax.game import Phase, make_play, players, rollout
from adadfq_jax.jobs import command_line
from adadfq_jax.models.generator import draw_inputs
from adadfq_jax.network import named
from adadfq_jax.runtime import sharding
from adadfq_jax.training import build
from adadfq_jax.training.loop import advance
from adadfq_jax.training.reconstruct import BlockError, Reconstruction
from adadfq_jax.training.spec import RunSpec, resolve

_SECONDS, _PASSES = 2.0, 5  # passes are timed until one of both is reached
_PROFILED = 3  # steps in a profile
_RANGE = (0.0, 6.0)  # of all activations, as if it had been observed


class Network(NamedTuple):
    """A network that is measured.

    Attributes:
      config: the packaged configuration.
      steps: number of steps in a scan and in a timed pass.
      images: number of images on which P's logits are compared.
      settings: values that differ from the configuration, by dotted name.
    """

    config: str
    steps: int
    images: int
    settings: Mapping[str, Any] = {}


NETWORKS = {
    "resnet20": Network("cifar10_resnet20", 50, 512),
    "resnet18": Network("imagenet_resnet18", 10, 64),
    "resnet50": Network("imagenet_resnet50", 10, 64, {"teacher.model": "resnet50"}),
    "mobilenetv2": Network(
        "imagenet_mobilenet_v2", 10, 64, {"teacher.model": "mobilenetv2_w1"}
    ),
    "embedded": Network(
        "fashion_mnist_resnet20", 50, 512, {"reconstruction.iterations": 50}
    ),
    "tiny": Network(
        "cifar10_resnet20",
        *(3, 8),
        {
            "teacher.model": "tiny",
            "teacher.image_shape": (16, 16, 3),
            "reconstruction.iterations": 4,
            "reconstruction.images": 32,
        },
    ),
}
_IMAGENET = ("resnet18", "mobilenetv2", "resnet50")
# Cases are written 'network batch kind numbers'. The first ones are the most useful.
CASES = [
    f"{what} {numbers}"
    for what in (
        "resnet20 16 step",
        "resnet20 16 scan",
        *(f"{network} 128 step" for network in _IMAGENET),
        "embedded 32 blocks",
        *("resnet20 128 scan", "resnet20 512 scan"),
        *(f"{network} 16 step" for network in _IMAGENET),
        *(f"{network} {n} scan" for n in (16, 128) for network in _IMAGENET),
        *("resnet20 128 step", "resnet20 512 step"),
    )
    for numbers in NUMBERS
]
QUICK = ["tiny 4 step float32", "tiny 4 scan bfloat16", "tiny 8 blocks float32"]


def spec_of(case: str) -> RunSpec:
    """Return the spec of a case."""
    name, batch, kind, numbers = case.split()
    network = NETWORKS[name]
    dtype, precision = NUMBERS[numbers]
    section = "reconstruction" if kind == "blocks" else "game"
    return resolve(command_line.load_config(f"{network.config}:w4a4")).replace(
        {
            **network.settings,
            f"{section}.batch_size": int(batch),
            "compute_dtype": dtype,
            "matmul_precision": precision,
        }
    )


@functools.cache
def _teacher(network: str) -> Mapping[str, Any]:
    """Return the variables of a network's P, by name."""
    spec = spec_of(f"{network} 16 step {REFERENCE}")
    if not spec.teacher.path:
        with jax.default_matmul_precision(spec.matmul_precision):
            return measure.teacher_variables(spec)
    # The embedded file holds float32 alone; the package safetensors is not needed.
    content = Path(spec.teacher.path).read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    arrays = {
        name: np.frombuffer(
            content[begin:][slice(*entry["data_offsets"])], np.float32
        ).reshape(entry["shape"])
        for name, entry in json.loads(content[8:begin]).items()
        if name != "__metadata__"
    }
    return named(teacher.from_state_dict(arrays, spec.teacher.model))


class _Game:
    """A game before its first step, on one device."""

    def __init__(self, case: str):
        spec, p = spec_of(case), _teacher(case.split()[0])
        devices = jax.local_devices()[:1]
        self.assembly = build.assemble(spec, spec.game.batch_size)
        self.steps, state = build.build_game(self.assembly, p, devices)
        ranges = {
            name: quant.fixed_range(*map(jnp.float32, _RANGE))
            for name in state.q_ranges
        }
        state = state.replace(q_ranges=ranges)
        constants = (self.assembly.teacher(p), jax.random.key(spec.seed))
        self.state, self.constants = sharding.replicate((state, constants), devices)


@functools.cache
def _images(network: str) -> jax.Array:
    """Return images that a network's untrained G makes in full precision."""
    spec = spec_of(f"{network} 16 step {REFERENCE}")
    assembly = build.assemble(spec, spec.game.batch_size)
    state = build.initial_state(assembly, _teacher(network))
    count, classes = NETWORKS[network].images, spec.teacher.num_classes
    apply = functools.partial(assembly.generator.apply, mutable=["batch_stats"])
    with jax.default_matmul_precision(spec.matmul_precision):
        return jax.jit(apply)(
            {"params": state.g_params, "batch_stats": state.g_batch_stats},
            *draw_inputs(jax.random.key(1), count, classes),
        )[0]


@functools.cache
def _p_logits(network: str, numbers: str) -> jax.Array:
    """Compute P's logits on these images."""
    spec = spec_of(f"{network} 16 step {numbers}")
    graph = build.assemble(spec, spec.game.batch_size).parts.networks.p
    with jax.default_matmul_precision(spec.matmul_precision):
        run = jax.jit(functools.partial(players.p_logits, graph))
        return run(_teacher(network), _images(network).astype(graph.dtype))


def _logits_off(network: str, numbers: str) -> dict[str, float]:
    """Compare P's logits with those in full precision."""
    if numbers == REFERENCE:
        return {}
    found, expected = _p_logits(network, numbers), _p_logits(network, REFERENCE)
    off = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
    same = jnp.argmax(found, -1) == jnp.argmax(expected, -1)
    return {"logits_off": float(off), "top1_agrees": float(jnp.mean(same))}


@functools.cache
def _flops_per_image(network: str) -> float | None:
    """Count the operations of a step, divided by the images; None without a CPU.

    They are counted in the program for the CPU. JAX counts only compiled programs of a
    GPU, in which convolutions are calls of a library whose operations it does not know.
    """
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None
    started = _Game(f"{network} 16 step {REFERENCE}")
    assembly = started.assembly
    play = make_play(**assembly.parts._asdict())
    step = rollout.make_game_step(play, draw=assembly.draw)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        (started.state, *started.constants),
    )
    with jax.default_device(cpu):
        lowered = jax.jit(step, static_argnames="phase").lower(
            *shapes, phase=Phase.BOTH
        )
    costs: Any = lowered.cost_analysis()
    return costs["flops"] / assembly.batch_size


def _measure_game(case: str) -> dict[str, Any]:
    network, batch, kind, numbers = case.split()
    count = NETWORKS[network].steps
    each = count if kind == "scan" else 1
    game = _Game(case)
    found: dict[str, Any] = _logits_off(network, numbers)
    began = time.perf_counter()
    step: Any = game.steps(Phase.BOTH, each)
    lowered = step.lower(game.state, *game.constants)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    index = np.arange(1)  # what `sharding.parallel_step` maps over

    def compiled_step(_: int) -> Callable[..., Any]:
        return lambda state, *constants: compiled(index, state, constants)

    run = functools.partial(advance, compiled_step, per_dispatch=each)
    state, at, means = run(game.state, game.constants, 0, count)
    rates: list[float] = []
    until = time.perf_counter() + _SECONDS
    while not rates or (len(rates) < _PASSES and time.perf_counter() < until):
        state, at, again = run(state, game.constants, at, at + count)
        rates.append(again["steps_per_second"])
    rate = statistics.median(rates)
    if kind == "step":
        found["profile"] = profile.summary(
            lambda: run(state, game.constants, at, at + _PROFILED), _PROFILED / rate
        )
    memory = compiled.memory_analysis()
    found |= {
        "steps_per_second": rate,
        "images_per_second": rate * int(batch),
        "trace_seconds": traced - began,
        "compile_seconds": done - traced,
        "program_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "losses": {name: means[name] for name in ("generator", "student")},
    }
    flops = _flops_per_image(network)
    if flops is not None:
        speed = flops * found["images_per_second"]
        device = jax.local_devices()[0].device_kind
        share = device_tables.peak_share(device, numbers, speed)
        found |= {"flops_per_second": speed, "peak_share": share}
    return found


class _Rates:
    """Iterations per second by block, as a callback of the loop."""

    def __init__(self, ends: list[int]):
        self.ends = ends
        self.found: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Tell whether a block ends."""
        return step in self.ends

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Keep the rate."""
        del step, state
        self.found[metrics["block"]] = metrics["steps_per_second"]


def _measure_blocks(case: str) -> dict[str, Any]:
    network, _, _, numbers = case.split()
    devices, game = jax.local_devices()[:1], _Game(case)
    spec = game.assembly.spec
    reconstruction = Reconstruction(game.assembly, devices)
    images = reconstruction.draw_images(game.state, spec.seed)
    rates, seconds = _Rates(reconstruction.ends), []
    for _ in range(2):  # all programs are compiled in the first round
        errors: list[BlockError] = []
        began = time.perf_counter()
        reconstruction.fit(
            *(game.state, game.constants[0], spec.seed),
            images=images,
            errors=errors,
            per_dispatch=sharding.steps_per_dispatch(0, devices),
            callbacks=[rates],
        )
        seconds.append(time.perf_counter() - began)
    rate = statistics.harmonic_mean(rates.found.values())
    return {
        **_logits_off(network, numbers),
        "steps_per_second": rate,
        "images_per_second": rate * spec.reconstruction.batch_size,
        "trace_seconds": 0.0,
        "compile_seconds": seconds[0] - seconds[1],
        "blocks": [
            {**error._asdict(), "iterations_per_second": rates.found[error.block]}
            for error in errors
        ],
    }


def measure_case(case: str) -> dict[str, Any]:
    """Measure a case, or say why it cannot run on this device; return JSON values."""
    _, _, kind, numbers = case.split()
    began = time.perf_counter()
    try:
        with jax.default_matmul_precision(NUMBERS[numbers][1]):
            found = (_measure_blocks if kind == "blocks" else _measure_game)(case)
    # Too little memory, an operation without a kernel, a number that is not finite.
    except (RuntimeError, ArithmeticError) as error:
        found = {"failed": first_line(error)}
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        **found,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "seconds": time.perf_counter() - began,
    }


def run(folder: Path, seconds: float, quick: bool) -> None:
    """Measure this machine's first device.

    Args:
      folder: gets device.json and device.md.
      seconds: the time that it may take.
      quick: measure a tiny network in a few steps, on any device.

    Raises:
      InputError: there is no accelerator, or the folder's figures are of another one.
    """
    machine = {
        "platform": jax.default_backend(),
        "device": jax.local_devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    if machine["platform"] == "cpu" and not quick:
        raise InputError(
            "--device measures a GPU or a TPU, and JAX finds none here; --quick tries"
            " it out on the CPU"
        )
    # What was compiled before would take no time.
    jax.config.update("jax_enable_compilation_cache", False)
    cases = QUICK if quick else CASES
    Budget(folder, machine, cases, seconds, device_tables.document).measure(
        measure_case
    )
