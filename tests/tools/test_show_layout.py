"""tools/show_layout.py draws what the stages compute."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from tests.commands import run_python

TOOL = Path(__file__).resolve().parents[2] / "tools" / "show_layout.py"


def test_it_writes_a_png_for_the_given_shapes(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text("- {prefix: 5, responses: [2, 3]}\n- {prefix: 1, responses: [4]}\n")
    out = tmp_path / "layout.png"
    done = run_python([TOOL, "--shapes", shapes, "--out", out])
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


def test_no_title_is_cut_off_where_the_grouped_row_is_short(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text("- {prefix: 1000, responses: [64, 80, 40, 20, 30, 50, 60, 70]}\n")
    out = tmp_path / "made" / "layout.png"
    done = run_python([TOOL, "--shapes", shapes, "--out", out])
    assert done.returncode == 0, done.stderr
    picture = plt.imread(out)[..., :3]
    # What reaches over an edge colours the pixels there.
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 1).all()


def test_it_draws_the_ranks_of_a_deeper_tree(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text(
        "- {system: 9, prefix: 5, responses: [2, 3]}\n"
        "- {system: 9, prefix: 1, responses: [4, 30]}\n"
        "- {prefix: 3, responses: [6]}\n"
    )
    out = tmp_path / "ranks.png"
    done = run_python([TOOL, "--shapes", shapes, "--cp", "4", "--out", out])
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text("- {prefix: 5, responses: [2, 0]}\n")
    run = run_python([TOOL, "--shapes", shapes, "--out", tmp_path / "layout.png"])
    assert run.returncode == 2
    assert "entry 0" in run.stderr
