"""The parts of `tools/verify_equivalence.py`: the case, its two sides, and their comparison."""
