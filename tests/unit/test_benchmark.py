"""The benchmark's parts: what cannot be measured, budgets, profiles, tables."""

import itertools
import json
import types

import pytest

from adadfq_jax import config
from adadfq_jax.benchmark import budget, device, device_tables, measure, profile
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import command_line
from adadfq_jax.training.spec import resolve
from tests import jobs


def test_every_packaged_configuration_but_that_of_any_file_names_a_network():
    assert "fashion_mnist_resnet20" in config.names()
    for name in config.names():
        classes = command_line.load_config(name).teacher.num_classes
        assert (classes > 0) == (name != "any")


def test_pytorch_for_a_network_that_it_has_not(tmp_path):
    config_file = jobs.write_benchmark_config(tmp_path)
    players = object.__new__(measure.Players)
    players.spec = resolve(command_line.load_config(config_file))
    with pytest.raises(InputError, match="resnet20 alone"):
        players._torch_run()


def test_the_cases_are_those_that_are_wanted():
    games = [
        *(f"resnet20 {n}" for n in (16, 128, 512)),
        *(
            f"{network} {n}"
            for network in ("resnet18", "resnet50", "mobilenetv2")
            for n in (16, 128)
        ),
    ]
    wanted = {
        *(f"{game} {kind}" for game in games for kind in ("step", "scan")),
        "embedded 32 blocks",
    }
    pairs = itertools.product(wanted, ("float32", "tf32", "bfloat16"))
    assert sorted(device.CASES) == sorted(map(" ".join, pairs))
    for case in device.CASES:
        spec = device.spec_of(case)
        _, batch, kind, numbers = case.split()
        section = spec.reconstruction if kind == "blocks" else spec.game
        assert section.batch_size == int(batch)
        assert (spec.compute_dtype == "bfloat16") == (numbers == "bfloat16")
        assert (spec.matmul_precision == "highest") == (numbers == "float32")
    assert device.spec_of("embedded 32 blocks tf32").reconstruction.iterations == 50
    assert device.spec_of("resnet50 16 step tf32").teacher.image_shape == (224, 224, 3)


def test_a_cpu_is_measured_only_in_the_quick_form(tmp_path):
    with pytest.raises(InputError, match="JAX finds none here; --quick tries it"):
        device.run(tmp_path / "out", 60, quick=False)
    assert not (tmp_path / "out").exists()


def test_the_embedded_network_is_read_without_safetensors():
    from adadfq_jax.training import build

    ours = device._teacher("embedded")
    spec = device.spec_of("embedded 32 blocks float32")
    theirs = build.load_teacher(spec).function.variables
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


class Clock:
    """A clock that stands still between cases of so many seconds each."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.done = 0.0, seconds, []
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(budget, "time", clock)

    def run(self, case):
        self.now += self.seconds[case]
        self.done.append(case)
        return {"seconds": self.seconds[case]}


def make_budget(folder, cases, seconds, name="gpu"):
    return budget.Budget(
        folder, {"device": name}, cases, seconds, lambda found, order: str([*order])
    )


def test_a_case_that_no_longer_fits_is_left_out_and_measured_the_next_time(
    tmp_path, monkeypatch
):
    seconds = {"a 16": 30, "b 16": 5, "a 128": 40, "b 128": 5}
    clock = Clock(monkeypatch, seconds)
    first = make_budget(tmp_path / "out", [*seconds], 60)
    first.measure(clock.run)
    # 25 s are left for `a 128`, whose like took 30 s; `b 128` fits.
    assert clock.done == ["a 16", "b 16", "b 128"]
    assert first.missing == ["a 128"]
    written = json.loads((tmp_path / "out" / "device.json").read_text())
    assert set(written["cases"]) == set(clock.done)

    again = make_budget(tmp_path / "out", [*seconds], 60)
    again.measure(clock.run)
    assert clock.done[3:] == ["a 128"] and not again.missing

    with pytest.raises(InputError, match="choose another --out"):
        make_budget(tmp_path / "out", [*seconds], 60, name="tpu")


def events(lines, spans):
    """A trace: lines {tid: (process, line)}, spans (tid, begin, duration, name)."""
    named = [
        {
            "ph": "M",
            "name": f"{what}_name",
            "pid": 1,
            "tid": tid,
            "args": {"name": name},
        }
        for tid, names in lines.items()
        for what, name in zip(("process", "thread"), names, strict=True)
    ]
    return named + [
        {"ph": "X", "pid": 1, "tid": tid, "ts": ts, "dur": dur, "name": name}
        for tid, ts, dur, name in spans
    ]


def test_a_profile_has_the_operations_of_a_gpu_by_kind():
    lines = {1: ("/device:GPU:0", "Stream #13(Compute)"), 2: ("/device:GPU:0", "XLA")}
    # Times are rounded, so that an operation seems to begin before the last one ends.
    spans = [(1, 0, 5.01, "conv.1"), (1, 5, 3, "conv.2"), (1, 9, 4, "loop_add_fusion")]
    found = profile.by_kind(events(lines, [*spans, (2, 0, 99, "module")]))
    assert found == {"conv": 8.01, "loop_add_fusion": 4}


def test_what_is_in_a_loop_of_a_tpu_counts_once():
    lines = {1: ("/device:TPU:0", "XLA Ops"), 2: ("/device:TPU:0", "Steps")}
    spans = [(1, 0, 10, "while.3"), (1, 1, 4, "fusion.1_2"), (1, 5, 3, "fusion.2")]
    found = profile.by_kind(events(lines, [*spans, (2, 0, 99, "1")]))
    assert found == {"while": 3, "fusion": 7}


def test_peaks_are_known_by_the_name_of_the_device():
    share = device_tables.peak_share
    assert share("NVIDIA H100 80GB HBM3", "bfloat16", 98.9e12) == pytest.approx(0.1)
    assert share("NVIDIA H100 PCIe", "tf32", 37.8e12) == pytest.approx(0.1)
    assert share("TPU v5 lite", "bfloat16", 19.7e12) == pytest.approx(0.1)
    assert share("TPU v4", "float32", 275e12 / 60) == pytest.approx(0.1)
    assert share("NVIDIA L40S", "float32", 1e12) is None


def test_the_document_compares_losses_and_names_what_is_missing():
    row = {
        "steps_per_second": 4.0,
        "images_per_second": 64.0,
        "flops_per_second": 5e12,
        "peak_share": None,
        "program_bytes": 2**30,
        "trace_seconds": 1.0,
        "compile_seconds": 20.0,
        "device_peak_bytes": 2**31,
        "losses": {"generator": 2.0, "student": 1.0},
        "profile": {"busy": 0.5, "operations": {"add": 0.1, "conv": 0.9}},
    }
    other = {**row, "losses": {"generator": 2.02, "student": 0.97}, "logits_off": 0.01}
    failed = {"failed": "JaxRuntimeError: too large", "device_peak_bytes": None}
    cases = {"a 1 step float32": row, "a 1 step tf32": other, "a 9 step tf32": failed}
    found = {"machine": {"device": "GPU", "jax": "1"}, "cases": cases}
    text = device_tables.document(found, [*cases, "b 1 scan bfloat16"])
    lines = text.splitlines()
    cells = [
        [c.strip() for c in line.split("|")[1:-1]] for line in lines if "|" in line
    ]
    assert cells[3][:7] == ["a 1 step tf32", "250.00", "64", "5", "-", "1.00", "1 + 20"]
    assert cells[2][7:] == ["-", "-", "-"] and cells[3][7:] == ["1 %, 3 %", "1 %", "-"]
    assert "Memory in use on the device: 2.00 GiB at most." in lines
    assert "- a 1 step float32: device 50 % busy; conv 90 %, add 10 %" in lines
    assert "- a 9 step tf32: JaxRuntimeError: too large" in lines
    assert text.endswith("## Not measured: no time\n\n- b 1 scan bfloat16\n")
