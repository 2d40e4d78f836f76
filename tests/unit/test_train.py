"""The loop of the main job: pauses, fetches, several steps in a dispatch."""

import jax
import numpy as np

from adadfq_jax import game, recipes
from adadfq_jax.runtime import sharding
from adadfq_jax.training import build, schedule
from adadfq_jax.training.spec import resolve
from tests.jobs import tiny_config


def test_pauses_are_at_the_logging_points_and_where_something_happens(job):
    others = {"game.warmup_steps": 6, "checkpoint.every": 5}
    data = {"eval.enabled": True, "eval.dataset": "fashion_mnist"}
    pauses = schedule.pauses(resolve(tiny_config(job, **others, **data)))
    # Logs at 4, 8, 12; saves at 5, 10; phases end at 4, 6, 12; Q is measured at 6,
    # 8, 10 and 12.
    assert pauses == [4, 5, 6, 8, 10, 12]


def test_the_backend_decides_unless_the_configuration_does():
    devices = jax.devices()[:1]
    assert sharding.steps_per_dispatch(0, devices) == 1
    assert sharding.steps_per_dispatch(7, devices) == 7

    class Accelerator:
        platform = "tpu"

    assert sharding.steps_per_dispatch(0, [Accelerator()]) == 50


def test_runs_of_the_same_game_share_their_steps_and_others_do_not(job):
    def steps(devices=1, batch_size=16, bits=None, **values):
        function, spec, _ = build.load_teacher(resolve(tiny_config(job, **values)))
        assembly = build.assemble(spec, batch_size, function, bits)
        return build.compile_steps(assembly, jax.devices()[:devices])

    ours = steps()
    assert steps(**{"seed": 1, "log.every": 3, "eval.batch_size": 7}) is ours
    schedule = {"steps": 30, "observe_steps": 5, "warmup_steps": 9}
    assert steps(**{f"game.{name}": n for name, n in schedule.items()}) is ours
    others = [
        *(steps(devices=2), steps(batch_size=8), steps(bits={"unit.conv.kernel": 3})),
        *(steps(**{"game.lambda_l": 0.2}), steps(**{"quant.act_bits": 3})),
        *(steps(recipe="gdfq"), steps(compute_dtype="bfloat16")),
        steps(**{"teacher.mean": (0.1, 0.2, 0.3)}),
    ]
    assert len({id(found) for found in (ours, *others)}) == 9


def test_terms_of_the_users_own_may_read_the_schedule(job):
    term = recipes.Term(lambda x, s: 0.0, lambda s: 1 / s["steps"])
    mine = recipes.ADADFQ.adding(student={"mine": term})

    def compiled(steps):
        config = tiny_config(job, recipe="mine", **{"game.steps": steps})
        function, spec, _ = build.load_teacher(resolve(config, mine))
        return build.compile_steps(build.assemble(spec, 4, function), jax.devices()[:1])

    ours = compiled(30)
    assert compiled(30) is ours and compiled(31) is not ours


def test_bfloat16_leaves_q_and_the_state_in_float32(job):
    config = tiny_config(job, compute_dtype="bfloat16")
    function, spec, _ = build.load_teacher(resolve(config))
    devices, assembly = jax.devices()[:1], build.assemble(spec, 16)
    steps, state = build.build_game(assembly, function.variables, devices)
    key = sharding.replicate(jax.random.key(0), devices)
    teacher = sharding.replicate(assembly.teacher(function.variables), devices)
    step = steps(game.Phase.BOTH, 1)
    shapes = jax.eval_shape(step, state, teacher, key)
    for leaf in jax.tree.leaves(shapes):
        assert leaf.dtype in (np.float32, np.int32)
    program = jax.jit(step).lower(state, teacher, key).as_text()
    convolutions = [
        line for line in program.splitlines() if "stablehlo.convolution" in line
    ]
    types = ["bf16" in line.rsplit("->", 1)[-1] for line in convolutions]
    # Two of P's and its gradients are bfloat16, as many of Q's are not.
    assert any(types) and not all(types)
