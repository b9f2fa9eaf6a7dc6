"""Checkpoints as models that are never whole in memory."""
