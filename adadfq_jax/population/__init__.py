"""Several games at once in one compiled step: seeds, boundaries, weights, rates."""
