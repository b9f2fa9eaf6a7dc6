"""Artifacts and exports on the hub: a model card, and the upload."""
