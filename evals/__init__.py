"""A Coder (and a model) to numbers."""
