"""Folders of runs made by hand, whose numbers are known."""

import json

from adadfq_jax import config as base


def write_run(folder, tops=(80.0, 84.0, 85.0), finished=True, **settings):
    """A run's folder with evaluations at steps 100, 150 and 200."""
    config = base.default_config()
    common = {"game.steps": 200, "game.observe_steps": 50, "game.warmup_steps": 100}
    config.update_from_flattened_dict({**common, **settings})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=list))
    log = [{"step": step, "generator": 1.0} for step in (50, 100, 150, 200)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in log))
    evaluations = zip((100, 150, 200), tops, strict=True)
    summary = {
        "steps": 200,
        "p_top1": 90.0,
        "evaluations": [{"step": s, "q_top1": t} for s, t in evaluations],
        "seconds": 1,
        "device": "1 x cpu",
    }
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_four(folder):
    """Two finished seeds of a setting, one run of another, and one unfinished."""
    return [
        write_run(folder / "a" / "0"),
        write_run(folder / "a" / "1", (80.0, 87.0, 86.0), seed=1),
        write_run(folder / "b" / "0", (70.0, 75.0, 76.0), **{"quant.act_bits": 3}),
        write_run(folder / "a" / "2", finished=False, seed=2),
    ]
