"""What the proof for verl refuses before it starts verl; tests/integrations/verl runs the proof."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "verify_verl.py"
BRANCHES = "- {prefix: 9, responses: [{turns: [4], then: [3, 5]}]}"
MASKED = "- {prefix: 9, responses: [[4, {seen: 2}, 3], 5]}"


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (BRANCHES, (), "the responses of entry 0 branch (turns, then)"),
        ("- {prefix: 5000, responses: [3]}", (), "a sample has 5003 tokens, the model 4096"),
        (MASKED, ("--dp", "3"), "dp: 3 ranks for 2 samples; lower it"),
        (MASKED, ("--pp", "3"), "their product must divide the model's 4 layers"),
        # Everything is in order but for this environment.
        (MASKED, (), "verl is not installed; VERL=0.9.1 bash tests/environment.sh"),
    ],
)
def test_it_refuses_in_one_line(
    shapes: str, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "shapes.yaml"
    file.write_text(shapes, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(TOOL), "--shapes", str(file), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("verify_verl: ") and done.stderr.count("\n") == 1
