"""The first import of Megatron-Core in a program."""

from __future__ import annotations

from megatron_prefix.megatron.known_messages import hide_known_messages
from megatron_prefix.packages import MissingPackageError


def import_megatron() -> None:
    """Import Megatron-Core, without what it says of itself at import.

    Raises:
        MissingPackageError: it, torch, or a package that it imports without asking for it is not
            installed.
    """
    hide_known_messages()
    try:
        import megatron.core.models.gpt  # noqa: F401
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "megatron_prefix"):
            raise
        if missing in ("torch", "megatron"):
            install = "megatron-core" if missing == "megatron" else missing
            raise MissingPackageError(
                f"{install} is not installed; pip install {install}"
            ) from error
        # 0.18 and newer import triton without declaring it.
        raise MissingPackageError(
            f"megatron-core needs {missing}, which it does not install by itself; pip install "
            f"{missing}"
        ) from error
