"""The grid of sampled images."""

import numpy as np
import pytest
from PIL import Image

from adadfq_jax.jobs import samples


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_has_the_pixels_it_is_given(tmp_path, channels):
    values = np.linspace(0, 255, 12 * 64 * 64 * channels).round().astype(np.uint8)
    pixels = values.reshape(12, 64, 64, channels)
    samples._write_grid(tmp_path / "grid.png", pixels)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    grid = grid.reshape(2, 66, 10, 66, channels).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(20, 66, 66, channels)
    np.testing.assert_array_equal(grid[:12, :64, :64], pixels)
    assert (grid[12:] == 255).all()
