"""Files: checkpoints, artifacts, and a run that is under way."""
