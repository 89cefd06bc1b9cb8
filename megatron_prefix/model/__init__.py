"""Megatron's GPTModel with shared prefixes: its configuration and parts."""
