"""Learn sparse dictionaries of transformer activations, and find out whether they are any good."""
