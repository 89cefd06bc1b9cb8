"""Exact attention over packed rows in which prefixes are shared."""
