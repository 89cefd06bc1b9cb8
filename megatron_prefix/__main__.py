"""The command `megatron-prefix`, or `python -m megatron_prefix`: what a user starts, by name.

`train` is the package's. The other commands are programs of the repository's folder `tools`, which
stands beside the package in a clone.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

PROGRAM = "megatron-prefix"
TOOLS = Path(__file__).resolve().parents[1] / "tools"
COMMANDS = {
    "train": ("", "train as a YAML file says, or check that it can be done (--check)"),
    "convert": ("convert_checkpoint", "bring a Hugging Face model into Megatron, and take it out"),
    "plan": ("plan", "predict tokens, FLOPs and memory of a training step from its shapes"),
    "verify": ("verify_equivalence", "prove that shared prompts train as repeated prompts would"),
    "show": ("show_layout", "draw how a microbatch is packed, and who attends to whom"),
}
"""Name: the tool that it is, and what it does."""


def main() -> int:
    """Command line: the exit status of the command, 2 where there is none of that name."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_help(), end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        return _refuse(f"{name} is none of its commands: {', '.join(COMMANDS)}")
    sys.argv = [f"{PROGRAM} {name}", *rest]
    tool, _ = COMMANDS[name]
    if not tool:
        from megatron_prefix.training.__main__ import main as train

        return train()
    if not (TOOLS / f"{tool}.py").is_file():
        return _refuse(
            f"{name} is tools/{tool}.py of the repository, and there is no folder {TOOLS}; "
            "install the package in a clone, with pip install -e ."
        )
    # As `python tools/plan.py` has it: tools import what stands beside them.
    sys.path.insert(0, str(TOOLS))
    return importlib.import_module(tool).main()


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help says more. On several processes:",
            f"  torchrun --no-python --nproc-per-node 2 {PROGRAM} train run.yaml",
            "",
        ]
    )


def _refuse(message: str) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
