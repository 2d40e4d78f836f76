r"""One real step of an ImageNet configuration on CPU, in a process of its own.

    .venv/bin/python -m tests.imagenet_step imagenet_resnet18 16

Prints what came of it as JSON; peak_gib is the largest resident size of the process.
"""

import json
import resource
import sys

from adadfq_jax.runtime import allocator

RECORDS = {
    "imagenet_resnet18": "resnet18",
    "imagenet_mobilenet_v2": "mobilenetv2_w1",
    "imagenet_resnet50": "resnet50",
}


def play(name, batch_size):
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
    g_before = np.array(state.g_params["conv3"]["kernel"])
    after, metrics = steps(Phase.BOTH, 1)(
        state, assembly.teacher(p_variables), jax.random.key(0)
    )
    same = [np.array_equal(after.q_params[n], p_variables[n]) for n in after.q_params]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux
    return {
        "not_finite": [k for k, v in metrics.items() if not np.isfinite(v).all()],
        "first_bad_step": int(np.ravel(after.first_bad_step)[0]),
        "g_moved": not np.array_equal(after.g_params["conv3"]["kernel"], g_before),
        "q_moved": not all(same),
        "peak_gib": round(peak / 2**20, 2),
    }


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the main job does
    print(json.dumps(play(sys.argv[1], int(sys.argv[2]))))
