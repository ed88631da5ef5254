"""Solvers: one algorithm, one file."""
