"""How sparse each matrix shall be, and of how many bits."""
