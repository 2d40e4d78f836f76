"""A run: its parts, its loop, and the files that it writes into its folder."""
