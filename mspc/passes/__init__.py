"""Forward and backward passes, a block at a time."""
