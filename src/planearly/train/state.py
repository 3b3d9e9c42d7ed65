"""Training state: parameters and optimiser state in one safetensors file.

Holds every trainable parameter, its average where one is taken, every tensor of the optimisers'
state under "parameter name / state name", and in the header what is not a tensor (step, seconds,
best validation). Tensors that processes have divided are whole in the file: any number of processes
goes on from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from planearly.sharding import as_part, part, part_of
from planearly.tensors import load_tensors, note_in, save_tensors, set_weights, weights

_STATE, _AVERAGE = "optimizer/", "average/"


def save_training(
    path: Path, module: nn.Module, optimizers: list[Optimizer], note: dict[str, Any],
    averages: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write a checkpoint from which :func:`load_training` continues bit for bit.

    Args:
        averages: of the parameters, by their names.
    """
    tensors = weights(module) | {_AVERAGE + name: mean for name, mean in averages.items()}
    names = {id(p): name for name, p in module.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for entry, value in state.items():
                # fused optimisers keep their step count as a tensor, others may keep a number
                tensors[f"{_STATE}{names[id(parameter)]}/{entry}"] = torch.as_tensor(value)
    save_tensors(path, tensors, note)


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a checkpoint's tensors, the parameters."""
    return {name: tensor for name, tensor in tensors.items()
            if not name.startswith((_STATE, _AVERAGE))}


def has_moments(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint's tensors hold the optimisers' state."""
    return any(name.startswith(_STATE) for name in tensors)


def of_part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Of a checkpoint's tensors, the optimisers' state of a submodule, by its own names."""
    start = f"{_STATE}{name}."
    return {_STATE + key.removeprefix(start): tensor for key, tensor in tensors.items()
            if key.startswith(start)}


def steps(handle: IO[bytes]) -> int:
    """The steps that a checkpoint has behind it, by the head of its file; 0 if that is damaged."""
    try:
        return int(note_in(handle)["outcome"]["steps"])
    except (ValueError, KeyError, TypeError):
        return 0


def load_training(path: Path, module: nn.Module, optimizers: list[Optimizer],
                  averages: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Any]:
    """Restore module, optimisers and averages in place; returns the note."""
    tensors, note = load_tensors(path)
    set_weights(module, tensors, path)
    for name, mean in averages.items():
        part(mean).copy_(part_of(tensors[_AVERAGE + name], mean))
    parameters = dict(module.named_parameters())
    owner = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, tensor in tensors.items():
        if name.startswith(_STATE):
            parameter_name, _, entry = name.removeprefix(_STATE).rpartition("/")
            parameter = parameters[parameter_name]
            if tensor.shape == parameter.shape:
                tensor = as_part(part_of(tensor, parameter), parameter)
            # the step count too: fused optimisers read it on the device
            owner[id(parameter)].state[parameter][entry] = tensor.to(parameter.device)
    return note
