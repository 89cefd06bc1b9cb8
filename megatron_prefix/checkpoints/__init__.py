"""Checkpoints in Megatron's distributed format: a run's own, and weights to start from."""
