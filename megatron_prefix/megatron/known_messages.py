"""What Megatron-Core and torch say of themselves at import and at start, which no user can act on.

Each is named by its text, its category and the module that says it, so that whatever else these
say still reaches the user. For programs only: a library leaves its user's filters as they are.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

_MEGATRON = r"megatron\.core\."

_WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    (r"(Transformer Engine and )?Apex (is|are) not installed", UserWarning, _MEGATRON),
    (r"\w+ is experimental and still under active development", UserWarning, _MEGATRON),
    (r"assertion is always true", SyntaxWarning, r".*megatron.core.transformer."),
    # Said of cuda_graph_scope's own default, whether graphs are on or off.
    (r"full scope is deprecated", UserWarning, r"megatron\.core\.transformer\.transformer_config"),
    # Its optimizer looks whether a parameter has a gradient of another name.
    (
        r"The \.grad attribute of a Tensor that is not a leaf Tensor",
        UserWarning,
        r"megatron\.core\.optimizer\.",
    ),
    # Megatron's calls, under the names that torch has used before.
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning, r"torch\.distributed\.c10d_logger"),
    (
        r"`(load|save)_state_dict` is deprecated",
        FutureWarning,
        r"megatron\.core\.dist_checkpointing\.",
    ),
    (r"Please use DTensor instead", FutureWarning, r"torch\.distributed\.checkpoint\."),
    (
        r"(The argument order of (load|save) has been changed"
        r"|torch\.distributed is disabled, unavailable or uninitialized)",
        UserWarning,
        r"torch\.distributed\.checkpoint\.",
    ),
    (r"Failed to create unified memory mempool", UserWarning, r"megatron\.core\.inference\."),
)

_ABOUT_GPUS: tuple[tuple[str, type[Warning], str], ...] = (
    (
        r"When using (sequence parallelism|async grad allreduce) it is recommended to set the",
        UserWarning,
        r"megatron\.core\.tensor_parallel\.",
    ),
    (
        r"If you are using transformer_engine as the transformer implementation",
        UserWarning,
        r"megatron\.core\.transformer\.transformer_config",
    ),
)

_LOG_LINES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": (
        "DistributedDataParallel: full_param_layout not provided"
    ),
    "megatron.core.utils": "fused_indices_to_multihot has reached end of life",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}

_LOG_LINES_ABOUT_GPUS = {
    # Gated delta nets draw their first weights in it, which on the CPU is the only state there is.
    "megatron.core.tensor_parallel.random": "CPU RNG state changed within GPU RNG context",
}


def hide_known_messages() -> None:
    """Hide them in this process from now on; to be called before Megatron is imported."""
    _hide(_WARNINGS, _LOG_LINES)


def hide_messages_about_gpus() -> None:
    """Hide, in a program that runs on the CPU, what Megatron says of GPUs."""
    _hide(_ABOUT_GPUS, _LOG_LINES_ABOUT_GPUS)


def _hide(
    messages: tuple[tuple[str, type[Warning], str], ...], log_lines: Mapping[str, str]
) -> None:
    for text, category, module in messages:
        warnings.filterwarnings("ignore", message=text, category=category, module=module)
    for name, text in log_lines.items():
        logging.getLogger(name).addFilter(_BeginsOtherwise(text))


class _BeginsOtherwise(logging.Filter):
    """Lets every line pass that does not begin with a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._text)
