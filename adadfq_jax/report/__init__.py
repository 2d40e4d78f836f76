"""A run to look at: what it records on the way, and the page made of it."""
