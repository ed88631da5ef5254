"""A grid of dictionaries, fitted, measured and compared:  python -m experiments.compare SWEEP."""
