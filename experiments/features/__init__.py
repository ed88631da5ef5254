"""A static site of a run's features:  python -m experiments.features RUN."""
