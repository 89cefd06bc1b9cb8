"""The weights in training as a Hugging Face folder, by the conversion's table of tensors.

Gathers the whole model on rank 0, so it has to fit into one process's memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from megatron_prefix.rank_results import gather
from megatron_prefix.training.config import RunConfig
from megatron_prefix.training.full_tensors import full_parameters
from megatron_prefix.training.model import ModelChunks

_SHARD_BYTES = 5 * 10**9


def weights_exporter(chunks: ModelChunks, config: RunConfig) -> Callable[[Path], None]:
    """What writes config.json and the weights, as they are then, into a folder that is there.

    The result is collective over all ranks.

    Raises:
        ValueError: the conversion's packages are not installed, or the model is of no Hugging Face
            family that it knows, naming the option.
    """
    try:
        from megatron_prefix.conversion.architecture import from_model_config
        from megatron_prefix.conversion.hf_config import config_values
        from megatron_prefix.conversion.hf_folder import ShardWriter
        from megatron_prefix.conversion.mapping import Mapping, dtype_name
    except ImportError as error:
        raise ValueError(
            f"rollouts.engine: {config.rollouts.engine} writes the weights as a Hugging Face "
            f"model, whose packages are not installed ({error}): install megatron-prefix[rollouts]"
        ) from error
    mapping = Mapping(from_model_config(config.model))
    dtype = dtype_name(chunks.config.params_dtype)

    def export(directory: Path) -> None:
        full = full_parameters(chunks)

        def write() -> None:
            if full is None:
                return
            writer = ShardWriter(directory, max_shard_bytes=_SHARD_BYTES)
            for parameter in mapping.parameters():
                key, index = next(place for place in parameter.places if place[0] in full)
                for name, tensor in mapping.to_hf(parameter, full[key][index]).items():
                    writer.add(name, tensor)
            writer.finish()
            values = config_values(mapping.architecture, dtype)
            text = json.dumps(values, indent=2, sort_keys=True) + "\n"
            (directory / "config.json").write_text(text, encoding="utf-8")

        gather(write)

    return export
