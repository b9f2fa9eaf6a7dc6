"""Compressed models that stay compressed while they run: `load`, and the linear layer that holds a stored matrix."""
