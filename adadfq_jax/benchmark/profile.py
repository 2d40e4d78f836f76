"""Profiles: which kinds of operations take the time of a device."""

import gzip
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

_KEPT = 8  # kinds of operations in a summary


def summary(run: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Run a function that waits for the device, and summarise its profile.

    Args:
      run: the function.
      seconds: that it takes without the profiler.

    Returns:
      'busy', the operations' time over `seconds`, and 'operations', the shares of the
      longest kinds by name. {} where the profiler does not work.
    """
    spent: Counter[str] = Counter()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would fill the trace
    with tempfile.TemporaryDirectory() as folder:
        try:
            with jax.profiler.trace(folder, profiler_options=options):
                run()
        except RuntimeError:  # the driver may not allow it
            return {}
        for path in Path(folder).glob("**/*.trace.json.gz"):
            with gzip.open(path, "rt") as file:
                spent += by_kind(json.load(file)["traceEvents"])
    total = sum(spent.values())
    if not total:
        return {}
    return {
        "busy": total / 1e6 / seconds,
        "operations": {kind: us / total for kind, us in spent.most_common(_KEPT)},
    }


def by_kind(events: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Sum up the microseconds of operations by kind, each without those within it.

    A kind is an operation's name without its number, such as loop_add_fusion.
    """
    spent: Counter[str] = Counter()
    around: list[tuple[Any, float, str]] = []  # line, end and kind of those around
    for event in sorted(
        _operations(events), key=lambda e: (*_line(e), e["ts"], -e["dur"])
    ):
        name = event.get("args", {}).get("hlo_op", event["name"])
        kind, line = re.sub(r"([._]\d+)+$", "", name), _line(event)
        end = event["ts"] + event["dur"]
        while around and (around[-1][0] != line or around[-1][1] < end):
            around.pop()
        if around:
            spent[around[-1][2]] -= event["dur"]
        spent[kind] += event["dur"]
        around.append((line, end, kind))
    return spent


def _line(event: Mapping[str, Any]) -> tuple[int, int]:
    return event["pid"], event["tid"]


def _operations(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Find the events that are operations.

    On a TPU these are in the line 'XLA Ops', on a GPU in those of the streams. On a CPU
    they have the name of an operation.
    """
    whole = [event for event in events if event.get("ph") == "X" and "dur" in event]
    named = [e for e in events if e.get("name") in ("process_name", "thread_name")]
    devices = {e["pid"] for e in named if e["args"]["name"].startswith("/device:")}
    for prefix in ("XLA Ops", "Stream"):
        lines = {
            _line(e)
            for e in named
            if e["pid"] in devices and e["args"]["name"].startswith(prefix)
        }
        if found := [event for event in whole if _line(event) in lines]:
            return found
    return [event for event in whole if "hlo_op" in event.get("args", {})]
