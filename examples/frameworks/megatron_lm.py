"""A script of a Megatron-LM checkout, its GPT models sharing prefixes.

    torchrun --nproc-per-node 8 megatron_lm.py train_rl.py OPTIONS OF train_rl.py

To be run in the checkout. The script imports `gpt_builder` from the module that is changed here.
"""

from __future__ import annotations

import os
import runpy
import sys

from megatron_prefix.integrations import prefix_model_provider


def main() -> None:
    """Run the script that the command line names first."""
    sys.path.insert(0, os.getcwd())
    import gpt_builders

    gpt_builders.gpt_builder = prefix_model_provider(gpt_builders.gpt_builder)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
