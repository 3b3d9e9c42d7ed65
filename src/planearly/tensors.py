"""Tensors on disk: one safetensors file with a note in its header, written whole or not at all.

Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from planearly import parallel, sharding
from planearly.errors import UserError
from planearly.files import atomic_write

_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
_LONGEST_HEAD = 100_000_000
"""Bytes that the format allows a header."""


def save_tensors(path: Path, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write named tensors and a JSON-able note as one safetensors file.

    The bytes are those of the format's own library, which would hold all of them in memory or
    write a file in a way of its own; here one tensor at a time comes from its device, and its parts
    from theirs: where some are divided every process calls this, and the first one writes.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # keeps all aligned
    if parallel.rank() > 0 and any(map(sharding.divided, tensors.values())):
        for name in names:
            sharding.whole(tensors[name])
        return
    header: dict[str, Any] = {"__metadata__": {"note": json.dumps(note, allow_nan=False)}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = sharding.whole(tensors[name].detach()).cpu().reshape(-1)
            handle.write(flat.view(torch.uint8).numpy())


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`save_tensors` wrote.

    Raises:
        UserError: the file is missing or not one of these.
    """
    with _opened(path):
        return load_file(path), note(path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as handle:
            yield handle
    except FileNotFoundError as error:
        raise UserError(f"the checkpoint {path} does not exist: run the same command again to "
                        "make what is missing") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({error}): delete its folder and run "
                        "the same command again") from error


def note(path: Path) -> dict[str, Any]:
    """The note of a file, without its tensors.

    Raises:
        UserError: as :func:`load_tensors`.
    """
    with _opened(path) as handle:
        found: dict[str, Any] = json.loads((handle.metadata() or {}).get("note", "{}"))
    return found


def note_in(handle: IO[bytes]) -> Any:
    """The same of an open file, of a store say, by its first bytes.

    Raises:
        ValueError, KeyError, TypeError: it is not one of these.
    """
    length = int.from_bytes(handle.read(8), "little")
    return json.loads(json.loads(handle.read(min(length, _LONGEST_HEAD)))["__metadata__"]["note"])


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name; what is frozen (under adapters) is no state of a training."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def set_weights(module: nn.Module, tensors: dict[str, Tensor], source: Path | str) -> None:
    """Copy named tensors, which are whole, into a module's trainable parameters.

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
        sharding.part(parameter).copy_(sharding.part_of(found, parameter))
