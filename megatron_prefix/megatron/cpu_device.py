"""Megatron-Core on machines without a GPU.

Megatron-Core names the device "cuda" in many places. `enable_cpu_device` redirects exactly these
places to the CPU, so that the unmodified schedules, optimizers and parallel layers run on gloo:

    torch.zeros(..., device="cuda"), Tensor.cuda(), Tensor.to("cuda")     -> CPU
    torch.cuda.current_device()                                           -> torch.device("cpu")
    torch.cuda.{synchronize, set_device, Stream, Event, ...}              -> no work to order
    CUDA random state (torch's, and Megatron's getter and setter)         -> the CPU generator
    Tensor.type()                                                         -> "torch.cuda.*Tensor"
    torch.compile                                                         -> runs uncompiled

`Tensor.type()` is what Megatron's optimizers sort parameters by. The switch is explicit,
process-wide and reversible; nothing happens on import.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)

_undo: list[Callable[[], None]] = []


class _NoStream:
    """Stands in for a CUDA stream or event: on the CPU all work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return _NoStream() if event is None else event

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_CURRENT_STREAM = _NoStream()


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _replace(owner: Any, name: str, value: Any) -> None:
    """Set `owner.name`, remembering how to undo it; an absent name stays absent."""
    missing = object()
    # Through __dict__, so that an inherited attribute (Tensor's C methods) is removed again,
    # and a static or class method is put back as it was.
    own = vars(owner).get(name, missing)
    if own is missing and not hasattr(owner, name):
        return
    setattr(owner, name, value)
    if own is missing:
        _undo.append(lambda: delattr(owner, name))
    else:
        _undo.append(lambda: setattr(owner, name, own))


def _replace_tensor_methods(float64: bool) -> None:
    original_to, original_type, original_float = (
        torch.Tensor.to,
        torch.Tensor.type,
        torch.Tensor.float,
    )

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        args = tuple("cpu" if _is_cuda(a) else a for a in args)
        return original_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original_type(self, dtype, *args, **kwargs)
        name = original_type(self)
        if float64 and self.dtype == torch.float64:
            name = "torch.FloatTensor"
        return name.replace("torch.", "torch.cuda.", 1)

    def float_(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.dtype == torch.float64 else original_float(self, *args, **kwargs)

    original_softmax = torch.softmax

    def softmax(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The router of an expert layer asks for float32.
        if input.dtype == torch.float64 and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return original_softmax(input, *args, **kwargs)

    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "record_stream", lambda self, stream: None)
    _replace(torch.Tensor, "to", to)
    _replace(torch.Tensor, "type", type_)
    if float64:
        _replace(torch.Tensor, "float", float_)
        _replace(torch, "softmax", softmax)


def _replace_torch_cuda() -> None:
    def get_rng_state(device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    stream_functions = ("current_stream", "default_stream")
    for name in stream_functions:
        _replace(torch.cuda, name, lambda *args, **kwargs: _CURRENT_STREAM)
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        _replace(torch.cuda, name, lambda *args, **kwargs: None)
    _replace(torch.cuda, "current_device", lambda: torch.device("cpu"))
    _replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    _replace(torch.cuda, "Stream", _NoStream)
    _replace(torch.cuda, "Event", _NoStream)
    for module in (torch.cuda, torch.cuda.random):
        _replace(module, "get_rng_state", get_rng_state)
        _replace(module, "set_rng_state", set_rng_state)
        _replace(module, "manual_seed", manual_seed)

    from megatron.core.tensor_parallel import random as megatron_random

    _replace(megatron_random, "_get_cuda_rng_state", get_rng_state)
    _replace(megatron_random, "_set_cuda_rng_state", set_rng_state)


def _repair_experts() -> None:
    """Two places in the expert layers that only work as written with a GPU."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron turns split sizes into NumPy arrays only on their way off a GPU.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", split_sizes)
    # Without Transformer Engine the router finds this name undefined.

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
        _undo.append(lambda: delattr(moe_utils, "te_general_gemm"))


def _run_uncompiled() -> None:
    """torch.compile knows nothing of what is replaced here.

    Compiled for float64, a gate or an activation would round to float32; and on a machine with a
    GPU the compiler asks `torch.cuda.current_device()` for the GPU that it describes.
    """
    torch.compiler.set_stance("force_eager")
    _undo.append(lambda: torch.compiler.set_stance("default"))


def enable_cpu_device(*, float64: bool = False) -> None:
    """Run Megatron-Core on the CPU in this process from now on.

    Args:
        float64: also let models be held in float64 (for proofs of equality): `Tensor.float()`
            and the router's softmax keep doubles, and Megatron's optimizers take doubles as main
            parameters.

    Calling it again with the same or a weaker choice changes nothing. `disable_cpu_device` puts
    everything back.
    """
    if _undo:
        disable_cpu_device()
    # torch remembers its factories at the first such block. Taken from here on they would be ours,
    # and `with torch.device("meta")`, which transformers loads models in, would have no effect.
    with torch.device("cpu"):
        torch.empty(0)
    for name in _FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))
    _replace_tensor_methods(float64)
    _replace_torch_cuda()
    _repair_experts()
    _run_uncompiled()


def disable_cpu_device() -> None:
    """Undo `enable_cpu_device`."""
    while _undo:
        _undo.pop()()


@contextlib.contextmanager
def cpu_device(*, float64: bool = False) -> Iterator[None]:
    """`enable_cpu_device` for the length of a with block."""
    enable_cpu_device(float64=float64)
    try:
        yield
    finally:
        disable_cpu_device()
