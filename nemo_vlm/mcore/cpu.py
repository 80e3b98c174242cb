"""Megatron-Core on a machine without CUDA.

Megatron-Core 0.16 assumes CUDA in a few places: the current device, streams, literal device="cuda", type names of
CUDA tensors, RNG state. `enable()` redirects these to the CPU. Where CUDA exists, or an NPU stands for it, it mends
only what Megatron takes of Transformer Engine or Apex without asking whether they are there.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nemo_vlm.mcore.npu import started

DeviceType = Literal["cpu", "cuda", "npu"]
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}  # of torch.distributed
CPU = torch.device("cpu")
PART = 2**20  # elements of which squares are summed in fp32
_mode: list[TorchFunctionMode] = []  # holds the active mode for the life of the process


def device() -> torch.device:
    """The device that this rank computes on."""
    if started():
        return torch.device("npu", torch.cuda.current_device())
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def enable() -> None:
    """Let Megatron-Core run on this process's device; idempotent."""
    name_router_kernel()
    if torch.cuda.is_available():
        choose_gpu_kernels()
    if torch.cuda.is_available() or _mode:
        return
    redirect_cuda_calls()
    redirect_rng()
    redirect_experts()
    redirect_gradients()
    leave_passes_alone()
    mode = CudaLiteralsToCpu()
    mode.__enter__()
    _mode.append(mode)


def without_redirection() -> contextlib.AbstractContextManager[None]:
    """For what names no CUDA: Python is then no longer asked about each of torch's functions."""
    return torch._C.DisableTorchFunction()


def import_megatron() -> None:
    """Import Megatron-Core without the compiler.

    At import it hands some forty small functions to torch.compile, which loads the compiler for them: more than a
    second of every start. The CPU has nothing from it and takes them as they are written.
    """
    if torch.cuda.device_count():  # is_available() would start CUDA, after which a process cannot be forked
        return
    compiler = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    import megatron.core  # noqa: F401

    torch.compile = compiler


class CudaLiteralsToCpu(TorchFunctionMode):
    """Arguments device="cuda" and pin_memory, Tensor.cuda(), and the type names that optimizer and clipping compare."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if "pin_memory" in kwargs:  # there is no device to copy to
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class NoStream:
    """Stands for torch.cuda.Stream and its events: on a CPU everything is in order already."""

    def wait_stream(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self) -> NoStream:
        return self


def name_router_kernel() -> None:
    """Routers ask for a kernel that Megatron imports with Transformer Engine alone, and do without it."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


def choose_gpu_kernels() -> None:
    """Where neither Transformer Engine nor Apex is, Megatron's norm of all gradients waits once for each parameter.

    torch's attention by cuDNN plans anew for each length, and lengths here differ.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    def norm(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
        return torch.stack(torch._foreach_norm(lists[0])).norm()[None], None

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = norm
    torch.backends.cuda.enable_cudnn_sdp(False)


def redirect_cuda_calls() -> None:
    # Megatron passes the current device on to torch.empty and the like, which take a device as well as a number.
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.set_device = lambda *args, **kwargs: None
    torch.cuda.current_stream = lambda *args, **kwargs: NoStream()  # type: ignore[assignment, return-value]
    torch.cuda.Stream = NoStream  # type: ignore[assignment, misc]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, return-value]


def redirect_rng() -> None:
    """The RNG tracker of tensor parallelism forks CUDA's generator; here it forks the CPU's."""
    from megatron.core.tensor_parallel import random

    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment, return-value]
    logging.getLogger(random.__name__).setLevel(logging.ERROR)  # it warns where the CPU's generator is used in a fork
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def redirect_experts() -> None:
    """What sends tokens to experts. Gloo gathers no parts of different sizes, and is told sizes in lists alone."""
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_sizes(part: Tensor, group: Any, sizes: list[int] | None = None, *buffer: bool) -> Tensor:
        if sizes is None:
            return gather(part, group, None, *buffer)
        return exchange(torch.cat([part] * group.size()), [len(part)] * group.size(), sizes, group)

    def scatter_sizes(whole: Tensor, group: Any, sizes: list[int] | None = None, *buffer: bool) -> Tensor:
        if sizes is None:
            return scatter(whole, group, None, *buffer)
        ranks, mine = group.size(), sizes[group.rank()]
        return exchange(whole, sizes, [mine] * ranks, group).view(ranks, mine, *whole.shape[1:]).sum(0)

    send = torch.distributed.all_to_all_single

    def send_sizes(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = (as_list(output_split_sizes), as_list(input_split_sizes))
        return send(output, input, *sizes, group, async_op)

    torch.distributed.all_to_all_single = send_sizes
    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_sizes, scatter_sizes


def redirect_gradients() -> None:
    """The product that adds to a gradient buffer, and the norm of all gradients: apex's kernels on CUDA."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import layers

    def norm(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
        return sum_of_squares(lists[0]).sqrt()[None], None

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    clip_grads.l2_norm_impl = norm


def leave_passes_alone() -> None:
    """A micro-batch's forward and backward pass name no CUDA, and call more of torch than all the rest of a step."""
    from megatron.core.pipeline_parallel import schedules

    def alone(step: Callable) -> Callable:
        @functools.wraps(step)
        def run(*args: Any, **kwargs: Any) -> Any:
            with without_redirection():
                return step(*args, **kwargs)

        return run

    schedules.forward_step = alone(schedules.forward_step)
    schedules.backward_step = alone(schedules.backward_step)


def add_product(hidden: Tensor, grad: Tensor, total: Tensor, first: bool = False) -> None:
    """Hidden states [n, in] and gradients [n, out] of what a weight made of them: their product onto [out, in].

    Args:
        first: whatever is in the total is not to be counted.
    """
    if total.dtype is hidden.dtype:
        total.addmm_(grad.t(), hidden, beta=0 if first else 1)
    elif first:
        total.copy_(grad.t() @ hidden)
    else:
        total.add_(grad.t() @ hidden)


def sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """[] fp32. torch's norm takes one sum in fp32: of a large tensor it is off by a thousandth, and takes longer."""
    with without_redirection():
        parts = (part.float() for tensor in tensors for part in tensor.flatten().split(PART))
        return torch.tensor(sum((part.dot(part).item() for part in parts), 0.0))


def as_list(sizes: Any) -> list[int] | None:
    return None if sizes is None else [int(size) for size in sizes]


def exchange(sent: Tensor, sent_sizes: list[int], sizes: list[int], group: Any) -> Tensor:
    """Send a run of rows to each rank, and get one from each, one behind the other."""
    received = sent.new_empty(sum(sizes), *sent.shape[1:])
    torch.distributed.all_to_all_single(received, sent.contiguous(), sizes, sent_sizes, group=group)
    return received
