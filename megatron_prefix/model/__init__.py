"""Megatron's GPTModel with shared prefixes: its configuration, parts and memory."""
