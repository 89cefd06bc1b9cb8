"""Where a distributed checkpoint lies, by its own folder or by one that holds it. Without torch."""

from __future__ import annotations

from pathlib import Path

from megatron_prefix.checkpoints.files import complete_steps, step_path

TRACKER = "latest_checkpointed_iteration.txt"
"""In a folder of Megatron-LM's checkpoints: the newest one's number, or "release"."""


def find_checkpoint(path: Path) -> Path:
    """The folder of a distributed checkpoint.

    Args:
        path: the checkpoint itself, or a folder of them whose newest is taken: a run's output
            folder, its `checkpoints`, or one of Megatron-LM's or of `tools/convert_checkpoint.py`.

    Raises:
        ValueError: there is none.
    """
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise ValueError(f"{path}: {what}; name the folder of a distributed checkpoint")
    if (path / "metadata.json").exists():
        return path
    if (path / TRACKER).exists():
        text = (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        if text == "release" or text.isdigit():
            found = path / (text if text == "release" else f"iter_{int(text):07d}")
            if (found / "metadata.json").exists():
                return found
            raise ValueError(
                f"{path}: {TRACKER} names {found.name}, which is no distributed checkpoint (no "
                f"{found.name}/metadata.json); copy it again, or name a checkpoint's own folder"
            )
        raise ValueError(f"{path}: {TRACKER} says {text[:40]!r}, neither a number nor release")
    for folder in (path, path / "checkpoints"):
        steps = complete_steps(folder)
        if steps:
            return find_checkpoint(step_path(folder, steps[-1]))
    if (path / "config.json").exists():
        raise ValueError(
            f"{path}: a Hugging Face model, not a Megatron distributed checkpoint; make one of it: "
            f"tools/convert_checkpoint.py hf-to-megatron {path} OUTPUT"
        )
    raise ValueError(
        f"{path}: not a Megatron distributed checkpoint (no metadata.json), nor a folder of them "
        f"(no {TRACKER}, no step_...)"
    )
