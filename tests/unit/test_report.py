"""The report of a run: recorded on the way, written at its end."""

import json
import math

import numpy as np
import pytest

from adadfq_jax.errors import InputError
from adadfq_jax.report import (
    drawing,
    gather,
    layer_figures,
    pictures,
    record,
    snapshot,
)
from tests.made_runs import write_run


def test_noise_is_in_decibels():
    x = np.array([0.0, 1.0, 2.0, 3.0])
    layers = record._layers([("one", x, x + 0.1, np.zeros(1), np.full(1, 2.0))])
    assert layers.sqnr[0] == pytest.approx(10 * math.log10(14 / 0.04), rel=1e-5)
    edges = np.linspace(*snapshot.SPAN, snapshot.BINS + 1)
    bins = np.searchsorted(edges, [0, 0.5, 1, 1.25 - 1e-6], "right") - 1
    assert np.flatnonzero(layers.histogram[0]).tolist() == bins.tolist()


def test_labels_fill_whole_batches_with_enough_of_the_shown_classes():
    for classes, batch in ((10, 16), (100, 16), (1000, 200), (3, 7)):
        labels = record.labels_to_draw(classes, batch)
        assert len(labels) % batch == 0 and len(labels) >= record.GENERATED
        counts = np.bincount(labels, minlength=classes)
        assert counts[record.classes_shown(classes)].min() >= record.EACH_SHOWN


def test_figures_keep_their_names_to_themselves():
    svg = (
        '<svg id="a" xmlns="http://www.w3.org/2000/svg"'
        ' xmlns:xlink="http://www.w3.org/1999/xlink">'
        '<defs><style>*{}</style><path id="m1"/></defs>'
        '<g clip-path="url(#m1)"><use xlink:href="#m1" style="fill: #0072b2"/></g>'
        "<text>#m1</text></svg>"
    )
    found = drawing.to_inline(svg, "x")
    assert 'id="x-m1"' in found and 'href="#x-m1"' in found and "var(--blue)" in found
    assert "url(#x-m1)" in found and "<text>#m1</text>" in found
    assert "style>" not in found and 'id="a"' not in found


def test_a_part_of_a_configuration_is_refused_and_a_steps_text_is_a_number(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text('{"step": "7"}\n{"step": Infinity}\n')
    run = gather.read(folder)
    assert run.rows == [{"step": 7}] and len(run.notes) == 1
    values = {"quant": {"weight_bits": 4}, "game": {"steps": 5}}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"game\.observe_steps is missing"):
        gather.read(folder)


def test_layers_are_labelled_without_what_their_names_repeat():
    names = ["unit.conv.kernel:input", "unit.conv", "output.kernel", "Dense_0"]
    assert layer_figures.short_names(names) == ["unit", "unit", "output", "Dense_0"]


def test_large_images_are_thinned_out():
    strip = pictures._subsample(np.zeros((2, 224, 224, 3), np.uint8))
    assert strip.shape == (2, 56, 56, 3)
