r"""Trains an embedded full-precision network for Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    PYTHONPATH=. .venv/bin/python tests/tools/train_fashion_mnist_teacher.py \
        --workdir=/tmp/teacher

From the repository root; about 4.5 minutes an epoch on 2 cores; --model names another
network. Resumable: the same command goes on after the last finished epoch. Writes
`fashion_mnist_MODEL.safetensors` and a `.json` with seed and accuracy into
--output. The test images are only ever measured on; the file is that of the last
epoch, whatever its accuracy.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from adadfq_jax import models, teacher

MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, in [0, 1]


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes (LeCun's format), gzipped."""
    data = gzip.decompress(path.read_bytes())
    ndim = data[3]
    shape = np.frombuffer(data, ">i4", ndim, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def load_split(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [N, 28, 28, 1] and int32 labels [N] of 'train' or 't10k'."""
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")[..., None]
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    return images, labels.astype(np.int32)


def normalise(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float32) / 255 - MEAN) / STD


def augmented_batches(images, labels, batch_size, seed, epoch):
    """Shuffled batches of one epoch: random 2-pixel shifts and mirror images."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(images))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        batch = np.pad(images[rows], ((0, 0), (2, 2), (2, 2), (0, 0)))
        top, left = rng.integers(0, 5, (2, batch_size))
        windows = np.lib.stride_tricks.sliding_window_view(batch, (28, 28), (1, 2))
        batch = windows[np.arange(batch_size), top, left].transpose(0, 2, 3, 1)
        mirrored = rng.random(batch_size) < 0.5
        batch = np.where(mirrored[:, None, None, None], batch[:, :, ::-1], batch)
        yield normalise(batch), labels[rows]


def make_train_step(model, optimizer):
    """Jitted step on (params, batch_stats, opt_state), with the batch's loss."""

    def step(state, images, labels):
        params, batch_stats, opt_state = state

        def loss_fn(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = model.apply(variables, images, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean(), updates["batch_stats"]

        (loss, moved), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), moved, opt_state), loss

    return jax.jit(step, donate_argnums=0)


def top1(model, variables, images, labels, batch_size=500) -> float:
    """Accuracy in per cent."""
    predict = jax.jit(lambda v, x: jnp.argmax(model.apply(v, x), -1))
    correct = 0
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        predicted = np.asarray(predict(variables, normalise(images[rows])))
        correct += int((predicted == labels[rows]).sum())
    return 100 * correct / len(images)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, default="/usr/share/datasets/fashion-mnist"
    )
    parser.add_argument("--model", default="resnet20", choices=models.names())
    parser.add_argument("--output", type=Path, default="adadfq_jax/assets")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.2, help="peak learning rate")
    parser.add_argument("--weight_decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    images, labels = load_split(args.data, "train")
    test_images, test_labels = load_split(args.data, "t10k")
    model = models.get_model(args.model, num_classes=10)
    steps = args.epochs * (len(images) // args.batch_size)
    schedule = optax.cosine_onecycle_schedule(steps, args.rate, pct_start=0.2)
    optimizer = optax.chain(
        optax.add_decayed_weights(args.weight_decay),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )
    step = make_train_step(model, optimizer)
    variables = model.init(jax.random.key(args.seed), jnp.zeros((1, 28, 28, 1)))
    params, batch_stats = variables["params"], variables["batch_stats"]
    state = (params, batch_stats, optimizer.init(params))

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    manager = ocp.CheckpointManager(args.workdir.absolute(), options=options)
    done = manager.latest_step() or 0
    if done:
        state = manager.restore(done, args=ocp.args.StandardRestore(state))
    for epoch in range(done, args.epochs):
        started, losses = time.time(), []
        batches = augmented_batches(images, labels, args.batch_size, args.seed, epoch)
        for batch in batches:
            state, loss = step(state, *batch)
            losses.append(loss)
        manager.save(epoch + 1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        variables = {"params": state[0], "batch_stats": state[1]}
        accuracy = top1(model, variables, test_images, test_labels)
        print(
            f"epoch {epoch + 1}/{args.epochs}: loss {np.mean(losses):.4f}, test top-1"
            f" {accuracy:.2f} %, {time.time() - started:.0f} s",
            flush=True,
        )

    variables = {"params": state[0], "batch_stats": state[1]}
    accuracy = top1(model, variables, test_images, test_labels)
    record = {
        "script": "tests/tools/train_fashion_mnist_teacher.py",
        "model": args.model,
        "top1": accuracy,
        "mean": [MEAN],
        "std": [STD],
        **{k: getattr(args, k) for k in ("epochs", "batch_size", "rate")},
        **{k: getattr(args, k) for k in ("weight_decay", "seed")},
    }
    file = args.output / f"fashion_mnist_{args.model}.safetensors"
    teacher.save(file, variables, {"model": args.model}, args.model)
    file.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{file}: test top-1 {accuracy:.2f} %")


if __name__ == "__main__":
    main()
