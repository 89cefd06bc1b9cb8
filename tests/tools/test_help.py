"""Every tool's help: at once, without torch and Megatron, and with the defaults."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

_HELP = """
import os, runpy, sys
sys.argv = [sys.argv[1], "--help"]
sys.path[0] = os.path.dirname(sys.argv[0])  # as `python script.py` has it
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    assert not stopped.code
print("imported:", [name for name in ("torch", "megatron", "transformers") if name in sys.modules])
"""

DEFAULTS = {
    "verify_equivalence": "it decides the tolerances (default: float64)",
    "verify_verl": "steps of SGD (default: 3)",
    "plan": "data-parallel ranks (default: 1)",
    "benchmark": "hidden size (default: 256)",
    "benchmark_context_parallel": "measurements of each kind (default: 3)",
    "benchmark_host": "prompts of the batch (default: 512)",
    "benchmark_skipping": "of a batch (default: 16)",
    "benchmark_series": "tokens of a row at most (default: 8192)",
    "show_layout": "the picture to write (default: outputs/layout.png)",
    "convert_checkpoint": "show what a Hugging Face folder or a Megatron checkpoint holds",
}


@pytest.mark.parametrize("tool", DEFAULTS)
def test_help_imports_nothing_heavy_and_shows_defaults(tool: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", _HELP, str(TOOLS / f"{tool}.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=TOOLS.parent,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert DEFAULTS[tool] in " ".join(done.stdout.split())
    assert "(default: None)" not in done.stdout and "(default: False)" not in done.stdout
    # Of the processor, which other processes on the machine do not lengthen.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


def test_all_tools_are_looked_at() -> None:
    programs = {p.stem for p in TOOLS.glob("*.py") if '__name__ == "__main__"' in p.read_text()}
    assert programs - {"config_reference"} == set(DEFAULTS)
