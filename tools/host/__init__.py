"""What the benchmark of the host's work is made of."""
