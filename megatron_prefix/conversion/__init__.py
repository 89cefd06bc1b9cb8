"""Between Hugging Face folders (safetensors) and Megatron's checkpoints (torch_dist)."""

from megatron_prefix.conversion.architecture import Architecture
from megatron_prefix.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_prefix.conversion.errors import ConversionError

__all__ = ["Architecture", "ConversionError", "hf_to_megatron", "megatron_to_hf"]
