"""Prompts and rewards as text."""
