"""Tokenizer transplantation: another model's tokenizer for a model, without training."""
