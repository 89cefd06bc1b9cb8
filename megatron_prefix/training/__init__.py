"""A run from its YAML file to its last checkpoint."""
