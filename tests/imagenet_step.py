r"""One real step of an ImageNet configuration on CPU, in a process of its own.

    .venv/bin/python -m tests.imagenet_step imagenet_resnet18 16 [--channels=64] \
        [--timed=3]

Prints what came of it as JSON; peak_gib is the largest resident size of the process.
--timed=N also runs N steps of G alone and N of both players, and prints the median
seconds of each. --channels sets config.game.generator_channels.
"""

import argparse
import json
import resource
import statistics
import time

from adadfq_jax.runtime import allocator

RECORDS = {
    "imagenet_resnet18": "resnet18",
    "imagenet_mobilenet_v2": "mobilenetv2_w1",
    "imagenet_resnet50": "resnet50",
}


def play(name, batch_size, channels=128, timed=0):
    """A step in which both players train, at 224 x 224."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from adadfq_jax import quant, teacher
    from adadfq_jax.game import Phase
    from adadfq_jax.network import named
    from adadfq_jax.training import build
    from adadfq_jax.training.spec import resolve
    from tests import helpers
    from tests.configurations import CONFIGS, get_config

    config = get_config(CONFIGS[0].parent / f"{name}.py", "w4a4")
    config.game.generator_channels = channels
    state_dict = helpers.filled_state_dict(RECORDS[name], RECORDS[name])
    config.teacher.model = teacher.recognise(state_dict).model
    p_variables = named(teacher.from_state_dict(state_dict))
    devices = jax.local_devices()[:1]
    assembly = build.assemble(resolve(config), batch_size)
    steps, state = build.build_game(assembly, p_variables, devices)
    # As if every quantizer had seen values from 0 to 6.
    ranges = {
        name: quant.fixed_range(jnp.float32(0), jnp.float32(6))
        for name in state.q_ranges
    }
    state = state.replace(q_ranges=ranges)
    fixed = assembly.teacher(p_variables), jax.random.key(0)
    g_before = np.array(state.g_params["conv3"]["kernel"])
    after, metrics = steps(Phase.BOTH, 1)(state, *fixed)
    same = [np.array_equal(after.q_params[n], p_variables[n]) for n in after.q_params]
    found = {
        "not_finite": [k for k, v in metrics.items() if not np.isfinite(v).all()],
        "first_bad_step": int(np.ravel(after.first_bad_step)[0]),
        "g_moved": not np.array_equal(after.g_params["conv3"]["kernel"], g_before),
        "q_moved": not all(same),
    }
    for phase in (Phase.G_ONLY, Phase.BOTH) if timed else ():
        seconds = []
        # The first compiles, and the second once more, for what the first gave back.
        for _ in range(timed + 2):
            begin = time.perf_counter()
            after, _ = jax.block_until_ready(steps(phase, 1)(after, *fixed))
            seconds.append(time.perf_counter() - begin)
        found[f"seconds_{phase.value}"] = round(statistics.median(seconds[2:]), 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux
    return {**found, "peak_gib": round(peak / 2**20, 2)}


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the main job does
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=RECORDS)
    parser.add_argument("batch_size", type=int)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--timed", type=int, default=0)
    print(json.dumps(play(**vars(parser.parse_args()))))
