"""Populations: several games in one program are the games one by one; the command."""

import functools
import json
import signal

import chex
import jax
import numpy as np
import pytest

from adadfq_jax import game
from adadfq_jax.game import Phase
from adadfq_jax.jobs import evaluate, members
from adadfq_jax.training import build, population
from adadfq_jax.training.spec import resolve
from tests import jobs, runs
from tests.golden.fill import noise
from tests.jobs import tiny_config

POPULATION = [
    "--config.population=seed=0,1,2 game.q_rate=1e-3,1e-4,1e38",
    *jobs.RECONSTRUCTED,
]

NAMES = ("seed-0_q_rate-0.001", "seed-1_q_rate-0.0001", "seed-2_q_rate-1e+38")


@pytest.fixture(scope="module")
def played(job, tmp_path_factory):
    """A population whose third member fails, undisturbed: folder and process."""
    workdir = tmp_path_factory.mktemp("population") / "run"
    return workdir, runs.main(*job.arguments(f"--workdir={workdir}", *POPULATION))


def test_each_member_leaves_a_workdir_and_the_failed_one_its_reason(job, played):
    workdir, done = played
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: member {NAMES[2]}: step ") and "2 others" in last
    for seed, name in enumerate(NAMES[:2]):
        summary = json.loads((workdir / name / "summary.json").read_text())
        config = json.loads((workdir / name / "config.json").read_text())
        assert summary["seed"] == config["seed"] == seed
        assert config["population"] == "" and len(summary["evaluations"]) == 5
        assert jobs.steps(workdir / name)[-1] == 44
        assert len(summary["block_errors"]) == 3
        told = evaluate.evaluate(config, workdir / name / "quantized.safetensors")
        assert f"{summary['q_last_top1']:.2f} %" in told
    failed = workdir / NAMES[2]
    assert "not finite" in json.loads((failed / "failed.json").read_text())["failure"]
    assert not (failed / "quantized.safetensors").exists()
    whole = json.loads((workdir / "population.json").read_text())
    assert [row["name"] for row in whole["members"]] == list(NAMES)
    assert [bool(row["failure"]) for row in whole["members"]] == [False, False, True]
    assert "Its numbers failed: step" in (workdir / "compare.html").read_text()
    for name in NAMES:
        assert name in done.stdout


def test_a_population_stopped_twice_goes_on_to_the_same_bytes(job, played, tmp_path):
    """In the games, and in a reconstruction while the member before it is finished.

    Also after a kill between two members' saves, which leaves one ahead.
    """
    reference, workdir = played[0], tmp_path / "run"
    arguments = job.arguments(f"--workdir={workdir}", *POPULATION)
    stopped = runs.main(*arguments, signal_at=("step 10/20", signal.SIGTERM))
    assert stopped.returncode == 75, (stopped.stdout, stopped.stderr)
    assert "all saved at step" in stopped.stderr
    saved = [
        max((workdir / name / "checkpoints").iterdir(), key=lambda p: int(p.name))
        for name in NAMES[:2]
    ]
    assert saved[0].name == saved[1].name
    (saved[1] / "digest.sha256").unlink()

    # The second that says it is the second member.
    again = runs.main(*arguments, signal_at=("step 30/44", signal.SIGTERM, 2))
    assert again.returncode == 75, (again.stdout, again.stderr)
    assert "resuming at step 8 of 44" in again.stdout
    assert f"{NAMES[1]}: saved at step 3" in again.stderr
    assert (workdir / NAMES[0] / "summary.json").exists()

    done = runs.main(*arguments)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert f"{NAMES[1]}: resuming at step 3" in done.stdout
    for name in NAMES[:2]:
        file = f"{name}/quantized.safetensors"
        assert (workdir / file).read_bytes() == (reference / file).read_bytes()
        assert jobs.steps(workdir / name)[-1] == 44
    errors = [
        json.loads((folder / NAMES[1] / "summary.json").read_text())["block_errors"]
        for folder in (reference, workdir)
    ]
    assert errors[0] == errors[1]


def test_another_population_is_refused(job, played):
    other = "--config.population=seed=0,1"
    done = runs.main(*job.arguments(f"--workdir={played[0]}", other))
    runs.assert_refused(done, played[0], "population")


def test_its_exports_are_checked_before_the_games(job, tmp_path):
    wrong = "--config.export.float_layers=nothing"
    arguments = job.arguments(f"--workdir={tmp_path / 'run'}", *POPULATION, wrong)
    runs.assert_refused(runs.main(*arguments), "config.export.float_layers=nothing")
    assert not (tmp_path / "run").exists()


BATCH, SHAPE = 8, (8, 8, 3)  # vmapped convolutions are slow on CPU
SEEDS = "seed=0,1,2,3"


# Two seeds by two games of other numbers.
BOTH = (
    "seed=0,1,0,1 game.lambda_l=0.1,0.1,0.3,0.3 game.lambda_u=0.8,0.8,0.6,0.6"
    " game.alpha_ds=0,0,0.5,0.5 game.alpha_as=0.1,0.1,0.3,0.3"
    " game.g_rate=1e-6,1e-6,3e-6,3e-6 game.q_rate=1e-6,1e-6,1e-5,1e-5"
)


def smooth(parts):
    """A game without quantization."""
    return parts._replace(q_options=game.QOptions(None, None))


class Games:
    """The members' games, smooth or not: alone, and as a population."""

    def __init__(self, job, is_smooth):
        values = {"teacher.image_shape": SHAPE, "game.batch_size": BATCH}
        self.config = resolve(tiny_config(job, **values))
        self.draw = jax.jit(build.make_draw(self.config, BATCH))
        self.is_smooth = is_smooth
        # Observing means nothing without quantization.
        self.phase = Phase.BOTH if is_smooth else Phase.OBSERVE
        function = build.load_teacher(self.config).function
        self.teacher = game.Teacher(function.variables, {})
        # Q starts elsewhere, so that there is a disagreement without quantization too.
        self.q_start = {
            name: 1.1 * x if name in function.parameters else x
            for name, x in function.variables.items()
        }
        self.play_alone = functools.cache(self._play_alone)
        self.compiled = functools.cache(self._compiled)
        self.start_of = functools.cache(self._start_of)

    def parts(self, config, values=None):
        parts = build.assemble(config, BATCH).parts_with(values=values)
        return smooth(parts) if self.is_smooth else parts

    def configs(self, text):
        return [members.configure(self.config, m) for m in members.parse(text)]

    def start(self, config):
        return self.start_of(config.seed)

    def _start_of(self, seed):
        spec = self.config.replace({"seed": seed})
        assembly = build.assemble(spec, BATCH)._replace(parts=self.parts(spec))
        return jax.device_get(build.initial_state(assembly, self.q_start))

    def _play_alone(self, text):
        """The step of the first member of `text`: its numbers written into it."""
        parts = self.parts(self.configs(text)[0])
        play = game.make_play(**parts._asdict())
        return jax.jit(play, static_argnums=3)

    def alone(self, text, count, jitter=0):
        """Metrics by member and step; jitter moves the latents by 1e-6."""
        found = []
        for member, config in zip(members.parse(text), self.configs(text), strict=True):
            numbers = {k: v for k, v in member.values.items() if k != "seed"}
            same = " ".join(f"{k}={v},{v}" for k, v in numbers.items())
            play = self.play_alone(f"seed=0,1 {same}")
            key, state = jax.random.key(config.seed), self.start(config)
            metrics = []
            for i in range(count):
                batch = self.draw(jax.random.fold_in(key, i))
                if jitter:
                    z = batch.latents
                    z *= 1 + 1e-6 * noise(f"jitter{i}", z.shape, salt=jitter)
                    batch = batch._replace(latents=z)
                state, measured = play(state, self.teacher, batch, self.phase)
                metrics.append(measured)
            found.append(jax.device_get(metrics))
        return found

    def _compiled(self, layout_of):
        layout = population.choose_layout(4, *layout_of)
        make_parts = functools.partial(self.parts, self.config)
        made = population.make_steps(make_parts, self.draw, layout)
        compiled = jax.jit(made(self.phase, 1))
        return layout, compiled

    def together(self, text, count, layout_of):
        layout, compiled = self.compiled(layout_of)
        configs = self.configs(text)
        own = layout.split(population.member_arguments(configs))
        states = layout.split([self.start(config) for config in configs])
        found = [[] for _ in configs]
        for _ in range(count):
            states, metrics = compiled(states, self.teacher, own)
            for member, measured in zip(found, layout.join(metrics), strict=True):
                member.append(measured)
        return found, layout.join(states)


def with_deficit(metrics):
    """H' as 1 - H', which is what is computed: near H' = 0 the rest cancels."""
    return {k: 1 - v if k.startswith("h_") else v for k, v in metrics.items()}


@pytest.fixture(scope="module")
def smooth_games(job):
    return Games(job, True)


@pytest.fixture(scope="module")
def alone(smooth_games):
    """Metrics of the first 8 steps of each of `BOTH`, by member and step."""
    return smooth_games.alone(BOTH, 8)


@pytest.mark.parametrize(
    "layout_of",
    [(1, 2), (2, 2), (2, 1)],
    ids=["vmap", "2 devices, vmap", "2 devices, in turn"],
)
def test_members_are_the_games_one_by_one(smooth_games, alone, layout_of):
    together, _ = smooth_games.together(BOTH, 8, layout_of)
    for ours, theirs in zip(together, alone, strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            mine = {name: mine[name] for name in its}  # also terms of weight 0
            chex.assert_trees_all_close(
                with_deficit(mine), with_deficit(its), rtol=1e-4, atol=1e-6
            )
    # They are different games.
    assert len({float(member[-1]["generator"]) for member in alone}) == 4


def test_a_member_that_fails_leaves_the_others_bit_for_bit(smooth_games):
    wild = "game.q_rate=1e-6,1e38,1e-6,1e-5 seed=0,1,2,3"
    calm = "game.q_rate=1e-6,1e-6,1e-6,1e-5 seed=0,1,2,3"
    for layout_of in ((1, 2), (2, 1)):
        with_wild, states = smooth_games.together(wild, 6, layout_of)
        without, calm_states = smooth_games.together(calm, 6, layout_of)
        assert with_wild[1][-1]["first_bad_step"] >= 0
        for i in (0, 2, 3):
            chex.assert_trees_all_equal(with_wild[i], without[i])
            chex.assert_trees_all_equal(states[i], calm_states[i])


def test_a_quantized_population_is_as_near_as_its_last_bits_allow(job):
    """The tolerance of the recorded games: five times what 1e-6 in the latents does."""
    games = Games(job, False)
    alone = games.alone(SEEDS, 4)
    jittered = [games.alone(SEEDS, 4, jitter) for jitter in (1, 2, 3)]
    together, _ = games.together(SEEDS, 4, (1, 2))

    def rows(played, name):
        return np.asarray([[step[name] for step in member] for member in played])

    for name in ("margin", "disagreement", "agreement", "bn_stats", "student_gap"):
        theirs = rows(alone, name)
        spread = np.max([np.abs(rows(j, name) - theirs) for j in jittered], 0)
        error = np.abs(rows(together, name) - theirs)
        allowed = 5 * spread.max(1, keepdims=True) + 1e-3 * np.abs(theirs)
        assert (error <= allowed).all(), (name, error, allowed)


@pytest.mark.parametrize("layout_of", [(1, 2), (2, 1)])
def test_the_step_lowers_for_tpu_and_cuda_without_collectives(smooth_games, layout_of):
    layout, compiled = smooth_games.compiled(layout_of)
    configs = smooth_games.configs(SEEDS)
    own = layout.split(population.member_arguments(configs))
    states = layout.split([smooth_games.start(config) for config in configs])
    exported = jax.export.export(compiled, platforms=["tpu", "cuda"])(
        states, smooth_games.teacher, own
    )
    text = exported.mlir_module()
    assert text.count("stablehlo.convolution") > 10
    for name in ("all_reduce", "all_gather", "collective_permute", "all_to_all"):
        assert f"stablehlo.{name}" not in text
