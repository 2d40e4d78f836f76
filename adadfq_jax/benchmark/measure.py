"""The benchmark's measurements; each function returns plain values by name."""

import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adadfq_jax.benchmark.reference import make_reference_step
from adadfq_jax.deploy.network import graph_of
from adadfq_jax.errors import InputError
from adadfq_jax.evaluation import EvalSet
from adadfq_jax.evaluation.evaluator import Evaluator
from adadfq_jax.game import Phase, players
from adadfq_jax.jobs.configuration import resolved
from adadfq_jax.runtime import compile_cache, sharding
from adadfq_jax.teacher import package_function
from adadfq_jax.training import build
from adadfq_jax.training.spec import RunSpec

OBSERVED = 3  # steps of observing before the phases with frozen ranges
# For one step: relative error of the losses, 1 - cosine of the players' updates.
TOLERANCES = {"losses": 1e-3, "g_update": 0.02, "q_update": 0.02}
JITTERS, OWN_SPREADS = 4, 5  # see `Players.agreement`


def teacher_variables(spec: RunSpec) -> Any:
    """Load the configuration's P, or draw it at random if its file does not exist.

    The batch norms of a drawn P get the statistics of a batch of noise. With other
    statistics its logits would be so large that the last bit of an image would change
    the losses.
    """
    p = spec.teacher
    if p.path and Path(p.path).is_file():
        return build.load_teacher(spec).function.variables
    random = np.random.default_rng(0)

    def draw(name, leaf):
        name = name.rpartition(".")[2]
        if name == "kernel":
            bound = (6 / np.prod(leaf.shape[:-1])) ** 0.5
            return random.uniform(-bound, bound, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, name in ("scale", "var"), np.float32)

    function = package_function(p.model, p.num_classes, p.image_shape)
    variables = {name: draw(name, leaf) for name, leaf in function.variables.items()}
    images = random.standard_normal((16, *p.image_shape), np.float32)
    graph = graph_of(build.network_info(spec))
    _, found = jax.jit(functools.partial(players.p_forward, graph))(variables, images)
    for norm in graph.batch_norms:
        names = zip(norm.variables, ("mean", "var"), strict=True)
        variables |= {name: found[norm.name][what] for name, what in names}
    return jax.device_get(variables)


def alternate(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Measure the median seconds of each run; every round calls each run once."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _difference(after: Any, before: Any) -> np.ndarray:
    leaves = jax.tree.map(lambda a, b: np.ravel(np.subtract(a, b)), after, before)
    return np.concatenate(jax.tree.leaves(leaves)).astype(np.float64)


def _cosine(ours: Any, theirs: Any, before: Any) -> float:
    a, b = _difference(ours, before), _difference(theirs, before)
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / length) if length else float(not (a.any() or b.any()))


class Players:
    """The compiled steps, ours and the reference's, for one configuration and batch."""

    def __init__(self, spec: RunSpec, batch_size: int):
        self.spec, self.batch_size = spec, batch_size
        self.p_host = teacher_variables(spec)
        devices = jax.local_devices()[:1]
        assembly = build.assemble(spec, batch_size)
        steps, start = build.build_game(assembly, self.p_host, devices)
        self.steps = {phase: steps(phase, 1) for phase in Phase}
        self.constants = (
            sharding.replicate(assembly.teacher(self.p_host), devices),
            sharding.replicate(jax.random.key(spec.seed), devices),
        )
        reference = make_reference_step(
            assembly.parts, assembly.draw, spec.game.framed_weight
        )
        self.references = {
            phase: jax.jit(functools.partial(reference, phase=phase)) for phase in Phase
        }
        self.fresh = jax.device_get(start)
        state = start
        for _ in range(OBSERVED):
            state, _ = self.steps[Phase.OBSERVE](state, *self.constants)
        self.observed = jax.device_get(state)

    def runs(self, phase: Phase) -> dict[str, Callable[[], Any]]:
        """Return calls 'ours' and 'reference' that run a step on their own states."""
        functions = {"ours": self.steps[phase], "reference": self.references[phase]}

        def player(step):
            state = jax.device_put(self.observed)

            def run():
                nonlocal state
                state, metrics = step(state, *self.constants)
                return state, metrics

            return run

        return {name: player(step) for name, step in functions.items()}

    def agreement(self, phase: Phase) -> dict[str, Any]:
        """Compare the two steps after one step from the same state.

        One activation that rounds to the other code can reverse G's update, so that our
        step differs from itself when G's weights are moved by 1e-6. Where the two steps
        differ by more than `TOLERANCES`, this own difference is measured from `JITTERS`
        moved states, and `OWN_SPREADS` times the largest one is allowed.
        """
        reference, step = self.references[phase], self.steps[phase]
        theirs = jax.device_get(reference(self.observed, *self.constants))
        random = np.random.default_rng(0)

        def play(scale: float):
            g_params = jax.tree.map(
                lambda x: np.float32(x * (1 + scale * random.standard_normal(x.shape))),
                self.observed.g_params,
            )
            start = self.observed.replace(g_params=g_params)
            return jax.device_get(step(jax.device_put(start), *self.constants))

        ours = play(0.0)
        apart = self._apart(ours, theirs)
        allowed = dict(TOLERANCES)
        if any(apart[name] > allowed[name] for name in apart):
            own = [self._apart(play(1e-6), ours) for _ in range(JITTERS)]
            for name in allowed:
                spread = max(found[name] for found in own)
                allowed[name] = max(allowed[name], OWN_SPREADS * spread)
        agree = all(apart[name] <= allowed[name] for name in apart)
        return {**apart, "allowed": allowed, "agree": agree}

    def _apart(self, ours: Any, theirs: Any) -> dict[str, float]:
        """Return the distances of two results (state, metrics) of a step, by name."""
        (state, losses), (expected_state, expected) = ours, theirs
        before = self.observed
        return {
            "losses": max(
                abs(float(losses[name]) - float(expected[name]))
                / max(abs(float(expected[name])), 1e-3)
                for name in ("generator", "student")
            ),
            "g_update": 1
            - _cosine(state.g_params, expected_state.g_params, before.g_params),
            "q_update": 1
            - _cosine(state.q_params, expected_state.q_params, before.q_params),
        }

    def phase(self, phase: Phase, rounds: int, with_torch: bool = False):
        """Measure the steps per second and the agreement of a phase."""
        agreement = self.agreement(phase)  # it also compiles the steps
        runs = self.runs(phase)
        if with_torch:
            runs["torch"] = self._torch_run()
            runs["torch"]()
        seconds = alternate(runs, rounds)
        found: dict[str, Any] = {
            f"{name}_steps_per_second": 1 / value for name, value in seconds.items()
        }
        found["against_reference"] = seconds["reference"] / seconds["ours"]
        if with_torch:
            found["against_torch"] = seconds["torch"] / seconds["ours"]
            found["reference_over_torch"] = seconds["reference"] / seconds["torch"]
        return found | {"agreement": agreement}

    def _torch_run(self):
        if self.spec.teacher.model != "resnet20":
            raise InputError("--torch: the PyTorch step is for resnet20 alone")
        if self.spec.game.framed_weight:
            raise InputError(
                "--torch: the PyTorch step has no framed images; a configuration with"
                " game.framed_weight 0 is needed, as configs/cifar10_resnet20.py"
            )
        # XLA's threads share the cores, so that OpenMP's must not spin between steps.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            from adadfq_jax.benchmark.torch_step import make_torch_step
        except ImportError as error:
            raise InputError(f"--torch needs PyTorch ({error})") from error
        return make_torch_step(self.spec, self.p_host, self.batch_size)

    def arithmetic(self) -> dict[str, float]:
        """Count the floating-point operations of a compiled step of both players."""
        found = {}
        arguments = (self.observed, *self.constants)
        steps: dict[str, Any] = {
            "ours": self.steps[Phase.BOTH],
            "reference": self.references[Phase.BOTH],
        }
        for name, step in steps.items():
            cost = step.lower(*arguments).compile().cost_analysis()
            found[name] = float(cost["flops"])
        return found


def evaluation(spec: RunSpec, p_variables: Any, images: int) -> float:
    """Measure the images per second of P's evaluation, without compilation."""
    p, random = spec.teacher, np.random.default_rng(0)
    shape = (images, *p.image_shape)
    eval_set = EvalSet(
        random.integers(0, 256, shape, np.uint8),
        random.integers(0, p.num_classes, images).astype(np.int32),
    )
    evaluator = Evaluator(
        functools.partial(players.p_logits, graph_of(build.network_info(spec))),
        eval_set,
        mean=p.mean,
        std=p.std,
        batch_size=spec.eval.batch_size,
        devices=jax.local_devices()[:1],
    )
    variables = sharding.replicate(p_variables, jax.local_devices()[:1])
    evaluator.top1(variables)
    started = time.perf_counter()
    evaluator.top1(variables)
    return images / (time.perf_counter() - started)


def peak_megabytes() -> float:
    """Return the peak memory of this process, on Linux.

    `getrusage` cannot be used, because a process inherits its peak from its parent.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def in_process(
    spec: RunSpec, *, step: str = "ours", devices: int = 1, steps: int = 3
) -> dict[str, float]:
    """Run `child` in a new process; return its figures.

    Args:
      spec: of the run.
      step: 'ours' or 'reference'.
      devices: number of virtual devices, for 'ours'.
      steps: number of timed steps.
    """
    job = {"config": spec.to_json(), "step": step, "devices": devices, "steps": steps}
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-m", "adadfq_jax.benchmark.measure", json.dumps(job)]
    started = time.time()
    done = subprocess.run(
        [*command, repr(started)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"a process of the benchmark failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def child(job: dict[str, Any], started: float) -> dict[str, float]:
    """Measure this process's first steps, in the phase where both players train."""
    compile_cache.enable()
    with resolved(job["config"]) as spec:
        return _first_steps(spec, job, started)


def _first_steps(
    spec: RunSpec, job: dict[str, Any], started: float
) -> dict[str, float]:
    devices = jax.local_devices()[: job["devices"]]
    p_host = teacher_variables(spec)
    assembly = build.assemble(spec, spec.game.batch_size)
    steps, state = build.build_game(assembly, p_host, devices)
    step: Any = steps(Phase.BOTH, 1)
    if job["step"] == "reference":
        reference = make_reference_step(
            assembly.parts, assembly.draw, spec.game.framed_weight
        )
        step = jax.jit(functools.partial(reference, phase=Phase.BOTH))
        devices = devices[:1]
    key = sharding.replicate(jax.random.key(spec.seed), devices)
    p_variables = sharding.replicate(assembly.teacher(p_host), devices)
    built, seconds = time.time(), []
    for _ in range(job["steps"] + 1):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, p_variables, key))
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[1:])
    return {
        "to_first_step": built + seconds[0] - started,
        "compile": seconds[0] - median,
        "step": median,
        "peak_megabytes": peak_megabytes(),
    }


def start_up(spec: RunSpec, step: str = "ours") -> dict[str, dict[str, float]]:
    """Measure `child` with an empty compilation cache, then with the filled one."""
    before = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        try:
            return {name: in_process(spec, step=step) for name in ("cold", "warm")}
        finally:
            if before is None:
                del os.environ["JAX_COMPILATION_CACHE_DIR"]
            else:
                os.environ["JAX_COMPILATION_CACHE_DIR"] = before


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]), float(sys.argv[2]))))
