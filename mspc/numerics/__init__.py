"""Linear algebra, masks, quantization and scores of one matrix."""
