"""Records what short runs of every kind compute, and compares two such records.

    .venv/bin/python tests/tools/record_runs.py record DIR [--only=REGEX]
    .venv/bin/python tests/tools/record_runs.py compare DIR DIR

For each case, 30 steps of the main job in a process of its own: the lowered training
steps as StableHLO text without locations and names, and the SHA-256 of
`quantized.safetensors`, of the bytes and of the values that `load_quantized` reads from
it. A change that must not touch the numbers is recorded before and after: equal texts,
or, where a text differs for a reason, equal files. DIR keeps the texts, for `diff`.
The whole takes about a quarter of an hour on 2 cores. Exit code 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the package need not be installed
STEP_SIZE = 300_000  # characters; only programs of a whole step are as long
SCHEDULE = (
    "--config.game.steps=30",
    "--config.game.observe_steps=5",
    "--config.game.warmup_steps=15",
    "--config.game.rate_drops=(25,)",
)
QUIET = (
    "--config.eval.enabled=False",
    "--config.report.enabled=False",
    "--config.export.onnx=False",
    "--config.export.stablehlo=False",
    "--config.checkpoint.every=0",
)
RESNET = "configs/fashion_mnist_resnet20.py"
MOBILENET = "configs/fashion_mnist_mobilenet_v2.py"
TUNED = "recipe=adadfq_tuned"
CASES = {
    "adadfq": (f"{RESNET}:w4a4", "recipe=adadfq"),
    "adadfq_short": (f"{RESNET}:w4a4", "recipe=adadfq_short"),
    "adadfq_tuned": (f"{RESNET}:w4a4", "recipe=adadfq_tuned"),
    "adasg": (f"{RESNET}:w4a4", "recipe=adasg"),
    "gdfq": (f"{RESNET}:w4a4", "recipe=gdfq", "game.batch_size=16"),
    "gdfq_batch_kl": (f"{RESNET}:w4a4", "recipe=gdfq_batch_kl"),
    "adadfq_batch_kl": (f"{RESNET}:w4a4", "recipe=adadfq_batch_kl"),
    "tuned_w2a4": (f"{RESNET}:w2a4", TUNED),
    "tuned_first_last": (f"{RESNET}:w4a4", TUNED, "quant.first_last_bits=8"),
    "framed": (f"{RESNET}:w4a4", "recipe=adadfq", "game.framed_weight=0.1"),
    "averaged": (f"{RESNET}:w4a4", "recipe=adadfq", "game.q_average=0.98"),
    "released_ranges": (
        *(f"{RESNET}:w4a4", "recipe=adadfq"),
        "quant.range_ema=released",
    ),
    "bfloat16": (f"{RESNET}:w4a4", TUNED, "compute_dtype=bfloat16"),
    "mobilenet_w4a4": (f"{MOBILENET}:w4a4", TUNED),
    "mobilenet_w2a4": (f"{MOBILENET}:w2a4", TUNED),
    "population": (f"{RESNET}:w4a4", TUNED, "population=seed=0,1"),
    "two_devices": (f"{RESNET}:w4a4", TUNED, "devices=2"),
    "reconstruction": (
        *(f"{RESNET}:w4a4", "recipe=reconstruction"),
        *("reconstruction.iterations=3", "reconstruction.images=64"),
    ),
    "imagenet": (
        *("configs/imagenet_resnet18.py:w4a4", "game.batch_size=2"),
        *("game.steps=6", "game.observe_steps=2", "game.warmup_steps=4"),
        "game.rate_drops=(5,)",
    ),
}


def without_names(text: str) -> str:
    """StableHLO text without locations, result names and function names."""
    lines = [line for line in text.splitlines() if not line.startswith("#loc")]
    text = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", "\n".join(lines))
    text = re.sub(r'\{jax\.result_info = "[^"]*"\}', "", text)
    text = re.sub(r'(, )?jax\.result_info = "[^"]*"(, )?', "", text)
    symbols: dict[str, str] = {}
    return re.sub(
        r"@[\w.$-]+", lambda m: symbols.setdefault(m[0], f"@f{len(symbols)}"), text
    )


def read_values(file: Path) -> str:
    """The SHA-256 of everything that the quantized network computes with."""
    import numpy as np

    import adadfq_jax

    network = adadfq_jax.load_quantized(file)
    kernels = {name: k.dequantize() for name, k in network.kernels.items()}
    values = {**network.variables.variables, **kernels, **network.ranges}
    total = hashlib.sha256()
    for name in sorted(values):
        total.update(name.encode())
        total.update(np.ascontiguousarray(values[name], np.float32).tobytes())
    return total.hexdigest()


def write_teacher(file: Path) -> None:
    """A ResNet-18 of 1,000 classes with random weights."""
    import jax
    import numpy as np

    from adadfq_jax import models, teacher

    model = models.get_model("resnet18", num_classes=1000)
    shape = np.zeros((1, 224, 224, 3), np.float32)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(7), shape))
    teacher.save(file, variables, {}, "resnet18")


def record(name: str, folder: Path, cache: Path) -> dict[str, object]:
    """Runs a case; what it computed."""
    config, *keys = CASES[name]
    texts = folder / name
    texts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        more = [f"--config.{key}" for key in keys]
        if name == "imagenet":
            write_teacher(work / "p.safetensors")
            more.append(f"--config.teacher.path={work / 'p.safetensors'}")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "adadfq_jax.main", f"--config={config}"),
                *(f"--workdir={work / 'run'}", *SCHEDULE, *QUIET, *more),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_DUMP_IR_TO": str(work / "ir"),
                "XDG_CACHE_HOME": str(cache),
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2"
                if name == "two_devices"
                else "",
            },
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"error: {name}: exit code {done.returncode}\n{done.stderr}")
        steps = []
        for file in sorted((work / "ir").glob("*_compile.mlir")):
            text = without_names(file.read_text())
            if len(text) > STEP_SIZE:
                steps.append(hashlib.sha256(text.encode()).hexdigest())
                (texts / f"step{len(steps)}.mlir").write_text(text)
        files = {
            str(path.relative_to(work / "run").parent): {
                "bytes": hashlib.sha256(path.read_bytes()).hexdigest(),
                "values": read_values(path),
            }
            for path in sorted((work / "run").rglob("quantized.safetensors"))
        }
    return {"steps": steps, "files": files}


def compare(before: Path, after: Path) -> int:
    """Prints a line for each case; how many differ."""
    old, new = (json.loads((d / "record.json").read_text()) for d in (before, after))
    differing = 0
    for name in sorted(old.keys() & new.keys()):
        a, b = old[name], new[name]
        same = {"text": a["steps"] == b["steps"]}
        for kind in ("bytes", "values"):
            same[kind] = [f[kind] for f in a["files"].values()] == [
                f[kind] for f in b["files"].values()
            ]
        differing += not all(same.values())
        words = (f"{k} {'equal' if v else 'DIFFER'}" for k, v in same.items())
        print(f"{name:18} {len(b['steps'])} steps:", ", ".join(words))
    return differing


def main() -> None:
    """Records or compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--only", default="", help="cases whose name matches")
    parser.add_argument("--cache", type=Path, help="of compiled programs, kept")
    arguments = parser.parse_args()
    if arguments.action == "compare":
        sys.exit(bool(compare(*arguments.folders)))
    (folder,) = arguments.folders
    file = folder / "record.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        for name in CASES:
            if re.search(arguments.only, name):
                found[name] = record(name, folder, arguments.cache or Path(place))
                file.write_text(json.dumps(found, indent=1))
                print(name, len(found[name]["steps"]), "steps", flush=True)


if __name__ == "__main__":
    main()
