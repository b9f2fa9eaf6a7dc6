"""The page that `report` writes: artifacts as one HTML file that needs nothing else."""
