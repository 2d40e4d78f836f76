"""The main job: reads the configuration, plays the game, writes the results."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from adadfq_jax import (
    data,
    export,
    files,
    game,
    losses,
    models,
    optim,
    results,
    sharding,
    teacher,
)
from adadfq_jax.config import check
from adadfq_jax.errors import InputError
from adadfq_jax.evaluate import Evaluator
from adadfq_jax.game import GameState, Phase
from adadfq_jax.metrics import MetricsLog, interval_means
from adadfq_jax.models.generator import CifarGenerator, draw_inputs
from adadfq_jax.progress import Progress, say

QUANTIZED_FILE = "quantized.safetensors"
SUMMARY_FILE = "summary.json"

Steps = dict[Phase, Callable[..., tuple[GameState, dict[str, jax.Array]]]]


def phase_at(step: int, game_config: ConfigDict) -> Phase:
    """The phase of step `step`, counted from 0."""
    if step < game_config.observe_steps:
        return Phase.OBSERVE
    return Phase.G_ONLY if step < game_config.warmup_steps else Phase.BOTH


def phase_ends(game_config: ConfigDict) -> list[int]:
    """Steps at which a phase is over; the last is the number of steps."""
    ends = {game_config.observe_steps, game_config.warmup_steps, game_config.steps}
    return sorted(end for end in ends if 0 < end <= game_config.steps)


def evaluation_steps(config: ConfigDict) -> list[int]:
    """Steps after which Q is evaluated: before it trains, between, and the last."""
    start, end = config.game.warmup_steps, config.game.steps
    return sorted({int(s) for s in np.linspace(start, end, config.eval.between + 2)})


def network_info(config: ConfigDict) -> export.NetworkInfo:
    """The description of Q that goes into the exported file."""
    p = config.teacher
    return export.NetworkInfo(
        model=p.model,
        num_classes=p.num_classes,
        image_shape=tuple(p.image_shape),
        mean=tuple(p.mean),
        std=tuple(p.std),
        weight_bits=config.quant.weight_bits,
        act_bits=config.quant.act_bits,
    )


def load_teacher(config: ConfigDict) -> Any:
    """P's variables, checked against what the configuration says of P."""
    p = config.teacher
    variables = teacher.load(p.path, p.model)
    expected = teacher.variable_shapes(p.model, p.num_classes, p.image_shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        found: Any = functools.reduce(lambda tree, key: tree[key.key], path, variables)
        if found.shape != leaf.shape:
            raise InputError(
                f"{p.path}: {jax.tree_util.keystr(path)} is {found.shape}, but"
                f" config.teacher (num_classes={p.num_classes},"
                f" image_shape={tuple(p.image_shape)}) needs {leaf.shape}"
            )
    return variables


def build_game(
    config: ConfigDict, p_variables: Any, devices: Sequence[jax.Device]
) -> tuple[Steps, GameState]:
    """Compiled steps by phase (traced at first use), and the state before step 0."""
    p, g, axis = config.teacher, config.game, sharding.AXIS
    info = network_info(config)
    generator = CifarGenerator(p.num_classes, tuple(p.image_shape), axis_name=axis)
    student = export.student(info, range_ema=config.quant.range_ema, axis_name=axis)
    draw = functools.partial(
        draw_inputs, batch_size=g.batch_size, num_classes=p.num_classes
    )
    rate = functools.partial(
        optim.step_decay, drops=tuple(g.rate_drops), factor=g.rate_drop_factor
    )
    g_optimizer = optim.generator_optimizer(rate(g.g_rate))
    q_optimizer = optim.student_optimizer(rate(g.q_rate), g.q_weight_decay)
    weights = ("lambda_l", "lambda_u", "alpha_ds", "alpha_as", "beta", "gamma")
    play = game.make_play(
        networks=game.Networks(
            generator.apply,
            models.get_model(p.model, num_classes=p.num_classes).apply,
            student.apply,
        ),
        generator_loss=losses.make_generator_loss(
            **{name: g[name] for name in weights}, axis_name=axis
        ),
        student_loss=losses.make_student_loss(temperature=g.temperature),
        g_optimizer=g_optimizer,
        q_optimizer=q_optimizer,
        weight_bits=info.weight_bits,
        axis_name=axis,
    )
    step = game.make_game_step(play, draw=draw, axis_name=axis)
    steps = {
        phase: sharding.parallel_step(functools.partial(step, phase=phase), devices)
        for phase in Phase
    }
    # The modules sync over the mapped axis in training only, so that initialising
    # outside of it works.
    key = jax.random.key(config.seed)
    g_variables = jax.jit(generator.init)(key, *draw(key))
    image = np.zeros((1, *p.image_shape), np.float32)
    ranges = jax.jit(student.init)(key, image)["ranges"]
    state = game.init_state(
        g_variables=g_variables,
        q_init={"params": p_variables["params"], "ranges": ranges},
        g_optimizer=g_optimizer,
        q_optimizer=q_optimizer,
    )
    return steps, sharding.replicate(state, devices)


class Measurements:
    """Top-1 of P and Q on the evaluation set; does nothing where that is disabled."""

    def __init__(self, config: ConfigDict, devices: Sequence[jax.Device]):
        self.history: list[tuple[int, float]] = []
        self._p = self._q = None
        if not config.eval.enabled:
            return
        e, info = config.eval, network_info(config)
        eval_set = data.load(e.dataset, e.data_dir, e.split)
        shape = eval_set.images.shape[1:]
        if shape != info.image_shape or eval_set.labels.max() >= info.num_classes:
            raise InputError(
                f"evaluation data {e.dataset!r} has images {shape} and labels to"
                f" {eval_set.labels.max()}, config.teacher says {info.image_shape} and"
                f" {info.num_classes} classes"
            )
        evaluator = functools.partial(
            Evaluator,
            eval_set=eval_set,
            mean=info.mean,
            std=info.std,
            batch_size=e.batch_size,
            devices=devices,
        )
        p_model = models.get_model(info.model, num_classes=info.num_classes)
        self._p = evaluator(p_model.apply)
        student = export.student(info, range_ema=config.quant.range_ema)
        self._q = evaluator(student.apply)

    def p_top1(self, p_variables: Any) -> float | None:
        """P's accuracy in per cent, None where evaluation is disabled."""
        return None if self._p is None else self._p.top1(p_variables)

    def measure_q(self, step: int, variables: Any) -> float | None:
        """Q's accuracy in per cent; kept in the history."""
        if self._q is None:
            return None
        self.history.append((step, self._q.top1(variables)))
        return self.history[-1][1]


def compile_and_time(steps: Steps, state: GameState, constants, config) -> float:
    """Compiles the phases that will be played; the game's expected seconds.

    Each is played twice on a throw-away copy of the state: once to compile, once
    to time it.
    """
    seconds, begin = 0.0, 0
    for end in phase_ends(config.game):
        step = steps[phase_at(begin, config.game)]
        copy = jax.tree.map(lambda x: x.copy(), state)
        copy, _ = jax.block_until_ready(step(copy, *constants))
        started = time.perf_counter()
        jax.block_until_ready(step(copy, *constants))
        seconds += (end - begin) * (time.perf_counter() - started)
        begin = end
    return seconds


def play_game(steps: Steps, state: GameState, constants, config, log, on_evaluate):
    """Plays all steps, with a line in the log per interval; returns the last state.

    `on_evaluate(step, state)` is called after each of `evaluation_steps` but the
    last. The host waits for the device at the logging points only.
    """
    g = config.game
    progress = Progress(g.steps)
    evaluate_at = set(evaluation_steps(config)) - {g.steps}
    log_at = set(phase_ends(g)) | evaluate_at
    pending, started = [], time.perf_counter()
    for step in range(g.steps):
        phase = phase_at(step, g)
        state, metrics = steps[phase](state, *constants)
        pending.append(metrics)
        done = step + 1
        if done % config.log.every == 0 or done in log_at:
            means = interval_means(pending)
            means["steps_per_second"] = len(pending) / (time.perf_counter() - started)
            log.write({"step": done, "phase": phase.value, **means})
            progress.update(done, means)
            if done in evaluate_at:
                on_evaluate(done, state)
            pending, started = [], time.perf_counter()
    progress.close()
    return state


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Plays the whole game and writes the workdir.

    Args:
      config: see `config.default_config`.
      workdir: gets config.json, metrics.jsonl, quantized.safetensors, summary.json.

    Returns:
      The contents of summary.json.

    Raises:
      InputError: the configuration, P's file or the evaluation data cannot be used.
    """
    started = time.time()
    check(config)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    devices = sharding.choose_devices(config.game.batch_size)
    p_host = load_teacher(config)
    p_variables = sharding.replicate(p_host, devices)
    measurements = Measurements(config, devices)
    workdir.mkdir(parents=True, exist_ok=True)
    for name in (QUANTIZED_FILE, SUMMARY_FILE):  # of an earlier run
        (workdir / name).unlink(missing_ok=True)
    files.write_json(workdir / "config.json", config.to_dict())

    p_top1 = measurements.p_top1(p_variables)
    say(results.describe_teacher(config, p_top1))
    warning = None if p_top1 is None else results.warn_of_teacher(config, p_top1)
    if warning:
        say(warning)

    steps, state = build_game(config, p_host, devices)
    key = sharding.replicate(jax.random.key(config.seed), devices)
    constants = (p_variables, key)
    seconds = compile_and_time(steps, state, constants, config)
    say(results.describe_game(config, seconds, devices))

    quantize = jax.jit(
        functools.partial(game.q_variables, weight_bits=config.quant.weight_bits)
    )

    def evaluate_q(step: int, state: GameState) -> None:
        top1 = measurements.measure_q(step, quantize(state, p_variables))
        if top1 is not None:
            say(f"step {step}: Q top-1 {top1:.2f} %")

    with contextlib.closing(MetricsLog(workdir / "metrics.jsonl")) as log:
        state = play_game(steps, state, constants, config, log, evaluate_q)

    file = workdir / QUANTIZED_FILE
    size = export.save_quantized(
        file,
        state.q_params,
        p_host["batch_stats"],
        state.q_ranges,
        info=network_info(config),
        range_ema=config.quant.range_ema,
    )
    # The reported last accuracy is that of the file, not of the network in memory.
    measurements.measure_q(config.game.steps, export.load_quantized(file).variables)
    summary = results.summarise(
        config,
        p_top1=p_top1,
        history=measurements.history,
        seconds=time.time() - started,
        size=size,
        devices=devices,
    )
    files.write_json(workdir / SUMMARY_FILE, summary)
    say(results.table(summary, file))
    return summary
