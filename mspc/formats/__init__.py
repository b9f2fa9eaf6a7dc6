"""Bit layouts as pairs of pure functions, pack and unpack."""
