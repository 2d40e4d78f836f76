"""The tones of the report's colours: apart for every eye, and from the card."""

import re
from pathlib import Path

import numpy as np
import pytest

from adadfq_jax.report import compare, drawing

STYLE = (Path(drawing.__file__).parent / "templates" / "style.css").read_text()
# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB.
VISION = {
    "all cones": np.eye(3),
    "no green cones": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "no red cones": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def tones(theme):
    """Linear RGB by name, of the theme that comes so manieth in the style sheet."""
    found = re.findall(r"--(\w+): (#\w+)", STYLE)
    names = [name for name, _ in found]
    per_theme = len(found) // 3
    assert names[:per_theme] == names[per_theme : 2 * per_theme]
    own = found[theme * per_theme : (theme + 1) * per_theme]
    return {name: linear(code) for name, code in own}


def linear(code):
    """Linear RGB of #rgb or #rrggbb."""
    digits = code[1:] if len(code) == 7 else "".join(2 * c for c in code[1:])
    srgb = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear RGB, relative to its white."""
    ratio = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(1)
    linear_part = (24389 / 27 * ratio + 16) / 116
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), linear_part)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one, other):
    """That of WCAG 2."""
    low, high = sorted((TO_XYZ[1] @ one, TO_XYZ[1] @ other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_every_two_colours_are_apart_for_every_eye(theme):
    found = tones(theme)
    for eye, matrix in VISION.items():
        seen = {name: lab(matrix @ found[name]) for name in drawing.CYCLE}
        for i, one in enumerate(drawing.CYCLE):
            for other in drawing.CYCLE[:i]:
                distance = np.linalg.norm(seen[one] - seen[other])
                assert distance >= 15, (eye, one, other, distance)


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_lines_and_text_stand_out_from_the_card(theme):
    found = tones(theme)
    for name in drawing.CYCLE:
        text = name == "red"  # names of the boundaries
        assert contrast(found[name], found["card"]) >= (4.5 if text else 3), name


def test_the_distances_are_those_of_the_literature():
    white, black = lab(linear("#fff")), lab(linear("#000"))
    np.testing.assert_allclose(white, [100, 0, 0], atol=0.01)
    np.testing.assert_allclose(black, [0, 0, 0], atol=0.01)
    assert contrast(linear("#fff"), linear("#000")) == pytest.approx(21)
    np.testing.assert_allclose(lab(linear("#f00")), [53.24, 80.09, 67.20], atol=0.02)


def test_groups_of_a_comparison_look_different_up_to_42():
    pairs = {
        (drawing.CYCLE[i % len(drawing.CYCLE)], compare._MARKERS[i % 7])
        for i in range(42)
    }
    assert len(compare._MARKERS) == 7 and len(pairs) == 42
