"""Reports of runs: recordings during training, and pages and tables made of them."""
