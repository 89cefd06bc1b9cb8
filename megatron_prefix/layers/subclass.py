"""Megatron's classes with our methods before their own."""

from __future__ import annotations

import functools


@functools.cache
def prefix_subclass(mixin: type, base: type) -> type:
    """The subclass of `base` whose methods are `mixin`'s first; `base` itself where it is one."""
    if issubclass(base, mixin):
        return base
    return type(f"Prefix{base.__name__}", (mixin, base), {})
