"""Rollouts that are sampled: prompts in, groups of responses with rewards out."""
