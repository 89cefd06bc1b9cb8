"""Process groups and devices, and what ranks tell each other beside Megatron's collectives."""
