"""Importing this hides Megatron's known messages: for a fork server, which only imports."""

from megatron_prefix.megatron.known_messages import hide_known_messages

hide_known_messages()
