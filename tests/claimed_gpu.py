"""A GPU that only claims to be one: its tensors compute on the CPU, and refuse what a real GPU refuses.

Tests run training, evaluation and export on it where there is no GPU. They find tensors that were
left on the CPU, or that meet a generator of random numbers of another device. They show nothing
about the numbers, the speed or the memory of a GPU.

    with claimed_gpu():
        torch.rand(2, device="cuda") + torch.rand(2)  # RuntimeError, as on a GPU

Differences from a GPU: autocast is that of the CPU, `torch.inference_mode` is `torch.no_grad`, and
page-locked memory is ordinary memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
"""Operators whose indices may be on the CPU."""
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like"),
    *("rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like"),
)


class OnGpu(Tensor):
    """A tensor that says it is on the GPU. It holds the tensor on the CPU that it stands for."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, operator = kwargs or {}, func.overloadpacket
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if operator is not aten.copy_:
            refuse_mixture(func, tensors, indices=tree_leaves(args[1]) if operator in INDEXED else ())
        found = func(*tree_map(held, args), **tree_map(held, kwargs))
        if operator is aten.copy_ and not isinstance(args[0], cls):
            return args[0]
        own = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, cls)}  # results of `add_` and so on

        def outer(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return own[id(value)] if id(value) in own else cls(value)

        return tree_map(outer, found)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.held.tolist()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        if id(self) not in memo:
            copy = OnGpu(self.held.detach().clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copy._is_param = True  # type: ignore[attr-defined]
            memo[id(self)] = copy
        return memo[id(self)]

    def __format__(self, spec: str) -> str:
        return format(self.held.detach(), spec)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"


def held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def refuse_mixture(func: Any, tensors: list[Tensor], indices: Any) -> None:
    """Single numbers may come from the CPU; if the first tensor is on the GPU, indices may, too."""
    exempt = {id(index) for index in indices} if isinstance(tensors[0], OnGpu) else set()
    for tensor in tensors:
        if not isinstance(tensor, OnGpu) and tensor.dim() and id(tensor) not in exempt:
            raise RuntimeError(
                f"{func}: expected all tensors on the same device, found cuda:0 and the CPU, {list(tensor.shape)}"
            )


class Arrive(torch.autograd.Function):
    """A copy on the GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return OnGpu(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return held(gradient)


class Leave(torch.autograd.Function):
    """A copy on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return held(x.detach()).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return OnGpu(gradient)


def moved(x: Tensor, device: Any) -> Tensor:
    if (torch.device(device).type == "cuda") == isinstance(x, OnGpu):
        return x
    return (Leave if isinstance(x, OnGpu) else Arrive).apply(x)  # type: ignore[no-untyped-call,no-any-return]


def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`."""
    target, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.device | str):
            target = value
        elif isinstance(value, Tensor):
            target, dtype = value.device, value.dtype
    x = x if target is None else moved(x, target)
    kept = {name: kwargs[name] for name in ("copy", "memory_format") if kwargs.get(name) is not None}
    kept |= {} if dtype is None else {"dtype": dtype}
    return Tensor.to(x, **kept) if kept else x


class Generator(torch.Generator):
    """A generator of random numbers that belongs to a device."""

    claimed: str

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, device="cpu")
        made.claimed = torch.device(device).type
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass


def check_generators(func: Any, args: Any, kwargs: Any) -> None:
    values = tree_leaves((args, kwargs))
    where = kwargs.get("device") or (GPU if any(isinstance(value, OnGpu) for value in values) else "cpu")
    for value in values:
        if isinstance(value, torch.Generator) and getattr(value, "claimed", "cpu") != torch.device(where).type:
            raise RuntimeError(f"{func}: expected a generator of {where}, found one of another device")


class Functions(TorchFunctionMode):
    """Functions that see or change a tensor's device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        check_generators(func, args, kwargs)
        first = args[0] if args else None
        if func is Tensor.to:
            return to(*args, **kwargs)
        if func in (Tensor.cpu, Tensor.cuda):
            return moved(first, func.__name__)
        if func is Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return isinstance(first, OnGpu)
        if func is Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return not isinstance(first, OnGpu)
        if isinstance(first, OnGpu):
            if func is Tensor.device.__get__:  # type: ignore[attr-defined]
                return GPU
            if func in (Tensor.numpy, Tensor.__array__):
                return first.numpy()
            if func in (Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage):
                return func(first.held)
            if func is F.one_hot:  # makes a tensor on the device by itself
                return OnGpu(func(first.held, *args[1:], **kwargs))
        if kwargs.get("device") is not None:  # such as `new_zeros`
            target = kwargs.pop("device")
            return moved(func(*args, **kwargs), target)
        return func(*args, **kwargs)


def making(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory such as `torch.zeros`. Not by a mode, because backward passes call factories too."""

    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if device is None:
            return make(*args, **kwargs)
        check_generators(make, args, {**kwargs, "device": device})
        found = make(*args, **kwargs)
        return moved(found.detach(), device).requires_grad_(found.requires_grad)

    return made


@contextmanager
def claimed_gpu() -> Iterator[None]:
    """One GPU with 64 GiB."""
    autocast = torch.autocast
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for name in FACTORIES:
            replace(torch, name, making(getattr(torch, name)))
        replace(torch, "Generator", Generator)
        replace(torch, "autocast", lambda device_type, *args, **settings: autocast("cpu", *args, **settings))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            replace(torch, name, partial(lambda ask, device="cpu": ask("cpu"), getattr(torch, name)))
        # views of wrapped tensors have no version counter in inference mode
        replace(torch._C, "_InferenceMode", lambda on: torch.no_grad() if on else nullcontext())
        replace(Tensor, "pin_memory", lambda self: self)
        replace(torch.cuda, "is_available", lambda: True)
        replace(torch.cuda, "device_count", lambda: 1)
        replace(torch.cuda, "set_device", lambda device: None)
        replace(torch.cuda, "synchronize", lambda device=None: None)
        replace(torch.cuda, "current_stream", lambda device=None: mock.Mock())
        replace(torch.cuda, "get_device_name", lambda device=None: "a claimed GPU")
        replace(torch.cuda, "mem_get_info", lambda device=None: (2**36, 2**36))
        replace(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
        replace(torch.cuda, "max_memory_allocated", lambda device=None: 2**20)
        replace(torch.cuda, "set_sync_debug_mode", lambda mode: None)
        overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # else `module.to` keeps the class of tensors
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwritten)
        stack.enter_context(Functions())
        yield
