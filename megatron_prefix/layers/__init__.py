"""Megatron modules that compute a packed row of shared prefixes, and what its batch carries."""
