"""All that depends on a release, private name or default of Megatron-Core, and torch's Adam in it.

The rest of the package does not ask which release runs.
"""
