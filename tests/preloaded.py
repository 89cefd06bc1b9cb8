"""What the processes of the tests have imported when they start; see `tests/fork_server.py`.

Importing is all that may happen here: threads and process groups do not survive a fork.
"""

import gc

import hypothesis
import pytest
import torch.distributed.checkpoint
import torch.testing
import yaml

import megatron_prefix.training.trainer  # noqa: F401

__all__ = ["hypothesis", "pytest", "torch", "yaml"]

# Objects that no collection visits keep their pages shared.
gc.collect()
gc.freeze()
