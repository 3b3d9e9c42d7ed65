"""Training state on disk: one safetensors file, written whole or not at all.

Holds every trainable parameter, every tensor of the optimisers' state under "parameter name / state
name", and in the header what is not a tensor (step, seconds, best validation). Nothing is pickled,
and a replicated state does not depend on the number of processes that wrote it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from planearly.errors import UserError
from planearly.files import atomic_write

_STATE = "optimizer/"
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def save_tensors(path: Path, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write named tensors and a JSON-able note as one safetensors file.

    The bytes are those of the format's own library, which would hold all of them in memory or
    write a file in a way of its own; here one tensor at a time comes from its device.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # keeps all aligned
    header: dict[str, Any] = {"__metadata__": {"note": json.dumps(note)}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().reshape(-1)
            handle.write(flat.view(torch.uint8).numpy())


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`save_tensors` wrote.

    Raises:
        UserError: the file is missing or not one of these.
    """
    try:
        with safe_open(path, "pt") as handle:
            note = json.loads((handle.metadata() or {}).get("note", "{}"))
        return load_file(path), note
    except FileNotFoundError as error:
        raise UserError(f"the checkpoint {path} does not exist") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({error})") from error


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name; what is frozen (under adapters) is no state of a training."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def set_weights(module: nn.Module, tensors: dict[str, Tensor], source: Path | str) -> None:
    """Copy named tensors into a module's trainable parameters.

    Raises:
        UserError: a parameter is missing or has another shape.
    """
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        found = tensors.get(name)
        if found is None or found.shape != parameter.shape:
            has = "is missing" if found is None else f"has shape {list(found.shape)}"
            raise UserError(
                f"{source}: '{name}' {has} where this model needs {list(parameter.shape)}; "
                "use the recipe that the checkpoint was made with"
            )
        parameter.copy_(found)


def save_training(
    path: Path, module: nn.Module, optimizers: list[Optimizer], note: dict[str, Any]
) -> None:
    """Write a checkpoint from which :func:`load_training` continues bit for bit."""
    tensors = weights(module)
    names = {id(p): name for name, p in module.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for entry, value in state.items():
                # fused optimisers keep their step count as a tensor, others may keep a number
                tensors[f"{_STATE}{names[id(parameter)]}/{entry}"] = torch.as_tensor(value)
    save_tensors(path, tensors, note)


def load_training(path: Path, module: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Restore module and optimisers in place; returns the note."""
    tensors, note = load_tensors(path)
    set_weights(module, tensors, path)
    parameters = dict(module.named_parameters())
    owner = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, tensor in tensors.items():
        if name.startswith(_STATE):
            parameter_name, _, entry = name.removeprefix(_STATE).rpartition("/")
            parameter = parameters[parameter_name]
            # the step count too: fused optimisers read it on the device
            owner[id(parameter)].state[parameter][entry] = tensor.to(parameter.device)
    return note
