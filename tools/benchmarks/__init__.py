"""What `tools/benchmark.py` compares: the sides, the levels they run at, and how they are timed."""
