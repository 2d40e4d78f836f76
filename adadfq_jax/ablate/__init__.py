"""Fair comparisons: a grid of arms, bits and seeds, and their table."""
