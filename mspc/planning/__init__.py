"""Planning: choosing the pattern, sparsity and bits of each matrix."""
