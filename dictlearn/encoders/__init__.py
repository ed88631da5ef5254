"""Encoders: rows to sparse codes."""
