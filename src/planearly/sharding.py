"""Tensors divided among processes: for a training whose state does not fit on one device.

A divided tensor is torch's ``DTensor``: every process has a part of it, and all of them call a
function here that needs the others' parts. Any other tensor is whole, the same on all.

The layers of a model are divided by FSDP2 (Zhao et al. 2023), which gathers a layer's weights while
they are used and hands every process its part of the gradients' sum.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planearly import parallel


@functools.cache
def _mesh() -> Any:
    """All processes, in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(parallel.device().type, (parallel.world(),))


def divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


@torch.no_grad()
def part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory: all of one that is whole."""
    return tensor.to_local() if divided(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return tensor.full_tensor() if divided(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process is to have of a whole tensor, if it is divided as ``like`` is."""
    if not divided(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    made: Any = distribute_tensor(tensor, like.device_mesh,  # type: ignore[attr-defined]
                                  like.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return made.to_local()


def as_part(own: Tensor, like: Tensor) -> Tensor:
    """The tensor of which ``own`` is this process's part, divided as ``like`` is and of its size.
    """
    return _of(own, like.placements[0], like.shape) if divided(like) else own  # type: ignore


def divide(parameter: nn.Parameter, dim: int) -> nn.Parameter:
    """A parameter divided along a dimension, on the processes' devices; from then on ``parameter``
    is not used."""
    from torch.distributed.tensor import Shard, distribute_tensor

    made = nn.Parameter(distribute_tensor(parameter.detach(), _mesh(), [Shard(dim)],
                                          src_data_rank=None), parameter.requires_grad)
    return _marked(made, vars(parameter))


@torch.no_grad()
def gathered(own: Tensor, size: Sequence[int], dim: int) -> Tensor:
    """A whole tensor [*size], of which every process has its part along ``dim``."""
    from torch.distributed.tensor import Shard

    return whole(_of(own, Shard(dim), size))


@torch.no_grad()
def summed_part(own: Tensor, dim: int) -> Tensor:
    """This process's part, along ``dim``, of the sum of all processes' tensors."""
    from torch.distributed.tensor import Partial, Shard

    return _moved(_of(own, Partial(), own.shape), Shard(dim))


@torch.no_grad()
def exchanged(own: Tensor, size: Sequence[int], had: int, gets: int) -> Tensor:
    """This process's part, along ``gets``, of the tensor [*size] whose part along ``had`` it has.
    """
    from torch.distributed.tensor import Replicate, Shard

    made = _of(own, Shard(had), size)
    if own.device.type == "cpu":  # gloo has no all-to-all
        made = made.redistribute(placements=[Replicate()])
    return _moved(made, Shard(gets))


def norm(gradients: Collection[Tensor]) -> Tensor:
    """The norm of all gradients together."""
    found = nn.utils.get_total_norm([g for g in gradients if not divided(g)])
    parts = [part(g) for g in gradients if divided(g)]
    if not parts:
        return found
    squares = nn.utils.get_total_norm(parts).square()
    dist.all_reduce(squares)
    return (found.to(squares) ** 2 + squares).sqrt()


@torch.no_grad()
def move(module: nn.Module, device: torch.device) -> None:
    """``module.to(device)``, whose divided parameters are there and remain the objects they are."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not divided(tensor):
            tensor.data = tensor.data.to(device)


# Models -----------------------------------------------------------------------------------------

def divide_layers(model: nn.Module, layers: Collection[nn.Module], entry: str, bf16: bool) -> None:
    """Divide a model's matrices, in place: each layer's are gathered while it runs, and the others'
    from ``entry`` on to the end of the backward pass. What has one dimension stays whole.

    Every process runs as many passes as the others. Gradients are sums over the processes.

    Args:
        layers: called as modules.
        entry: the method that runs the layers.
        bf16: the layers compute in it: so they are gathered in it.
    """
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    marks = {name: vars(parameter) for name, parameter in model.named_parameters()}
    small = {parameter for parameter in model.parameters() if parameter.dim() < 2}
    for module in (*layers, model):
        narrow = torch.bfloat16 if bf16 and module is not model else None
        fully_shard(module, mesh=_mesh(), ignored_params=small, mp_policy=MixedPrecisionPolicy(
            narrow, narrow and torch.float32, cast_forward_inputs=False))
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, entry)
    for name, parameter in model.named_parameters():
        _marked(parameter, marks[name])


def release(model: nn.Module) -> None:
    """Give back the memory of weights that a pass without a backward pass gathered."""
    if (reshard := getattr(model, "reshard", None)) is not None:
        reshard()


def _marked(parameter: nn.Parameter, marks: dict[str, Any]) -> nn.Parameter:
    vars(parameter).update(marks)
    return parameter


def _of(own: Tensor, placement: Any, size: Sequence[int]) -> Any:
    from torch.distributed.tensor import DTensor

    size = torch.Size(size)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(own.contiguous(), _mesh(), [placement], run_check=False, shape=size,
                              stride=stride)


def _moved(tensor: Any, placement: Any) -> Tensor:
    made: Tensor = tensor.redistribute(placements=[placement]).to_local()
    return made
