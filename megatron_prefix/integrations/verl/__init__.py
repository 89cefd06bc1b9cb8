"""verl's Megatron trainer with the prompt of each GRPO group computed once.

    actor_rollout_ref.model.external_lib=megatron_prefix.integrations.verl

verl imports this module wherever it makes its model's configuration: in the workers, where it
registers an engine that comes before verl's own, and in the process of the trainer, which then
keeps groups together when it deals a batch to data-parallel ranks. examples/frameworks/verl.md has
what it asks for and what it refuses.
"""

from __future__ import annotations

from megatron_prefix.integrations.verl.loading import load

load()
