"""Sampling from the live Megatron model: prompts computed once, responses from a cache."""
