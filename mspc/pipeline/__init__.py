"""A whole run of `compress` or `evaluate`."""
