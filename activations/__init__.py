"""Text to activations on disk."""
