"""Checkpoints of a small state, and damage to them."""

import numpy as np

from adadfq_jax.training.checkpoints import DIGEST_FILE, Checkpoints


def state_at(step):
    rng = np.random.default_rng(step)
    return {
        "step": np.int32(step),
        "params": {"kernel": rng.normal(size=(3, 4)).astype(np.float32)},
        "empty": {},
    }


def save(folder, steps, keep=3):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(
            step, state_at(step), {"seconds": step / 2, "top1": [[1, 2.5]]}
        )
    return checkpoints


def assert_is(checkpoint, step):
    assert checkpoint.step == step
    assert checkpoint.record == {"seconds": step / 2, "top1": [[1, 2.5]]}
    expected = state_at(step)
    np.testing.assert_array_equal(
        checkpoint.state["params"]["kernel"], expected["params"]["kernel"]
    )
    assert checkpoint.state["step"] == step
    assert checkpoint.state["empty"] == {}


def largest_file(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != DIGEST_FILE]
    return max(files, key=lambda p: p.stat().st_size)


def flip(folder):
    file = largest_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
