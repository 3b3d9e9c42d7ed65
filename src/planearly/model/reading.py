"""Model folders of others, read strictly: what would be read wrongly is refused, in one sentence.

A folder in Hugging Face format is ``config.json`` beside ``*.safetensors``. Both come from anybody:
a configuration may lack what it should say or say it in another type, and tensors may be the raw
numbers of a quantized model, which mean nothing without their scales.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from planearly.errors import UserError
from planearly.files import read_json

_FLOATS = ("F64", "F32", "F16", "BF16")
_NO_WEIGHT = re.compile(r"(attn|attention)\.(masked_)?bias$|position_ids$|rotary_emb\.")
"""Masks and positions that older checkpoints carry, of any type; no library reads them."""
_OF_QUANTIZED = re.compile(
    r"(_scale_inv|weight_scale|_scales|\.scales|\.qweight|\.qzeros|\.g_idx|\.absmax|\.SCB"
    r"|\.quant_state\.\w+|_packed|_blocks)$")
_MOST_LAYERS = 10_000
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What families of models call their number of layers."""
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_QUANTIZED = ("its numbers are no weights without their scales, which planearly does not read; "
              "give the model as it was before it was quantized")


def config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder.

    Raises:
        UserError: there is none, it is no JSON object, or it says that the weights are quantized.
    """
    if not (folder / "config.json").is_file():
        what = ("has no config.json" if folder.is_dir() else
                "is no folder" if folder.exists() else "does not exist")
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder} holds adapters and no model: merge them into the one that "
                            "they adapt (merge_and_unload of peft), and give what that saves")
        raise UserError(f"{folder} {what}: give a model folder in Hugging Face format")
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'} holds no JSON object: it is not the "
                        "configuration of a model")
    text = values.get("text_config")
    for part in (values, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if found := part.get(key):
                how = found.get("quant_method") if isinstance(found, dict) else found
                raise UserError(f"the model in {folder} is quantized ({how or key}): {_QUANTIZED}")
        for key in _LAYERS:
            layers = part.get(key)
            if isinstance(layers, int | float) and layers > _MOST_LAYERS:  # building never ends
                raise UserError(f"{folder / 'config.json'}: '{key}' is {layers}; no model has more "
                                f"than {_MOST_LAYERS}")
    return values


def number(values: dict[str, Any], key: str, folder: Path, *, default: float | None = None,
           whole: bool = True) -> Any:
    """A positive number of a configuration.

    Args:
        default: taken where the key is absent or null; None: it has to be there.
        whole: an integer is asked for.

    Raises:
        UserError: it is absent, of another type, or not positive.
    """
    found = values.get(key)
    found = default if found is None else found
    kinds = (int,) if whole else (int, float)
    if isinstance(found, bool) or not isinstance(found, kinds) or not found > 0:
        raise UserError(f"{folder / 'config.json'}: '{key}' is {found!r}; it must be a positive "
                        f"{'integer' if whole else 'number'}")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights.

    Raises:
        UserError: there are none, or one that the index names is missing; or others lie beside
            them, so that it is open which are the model's.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        found = read_json(index)
        parts = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(parts, dict) or not all(isinstance(p, str) for p in parts.values()):
            raise UserError(f"{index} does not say which file holds which tensor ('weight_map'): "
                            "copy the model again, whole")
        names = sorted(set(parts.values()))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: a model folder keeps its weights there, and "
                            "no other kind is opened; save_pretrained of transformers writes it")
    others = sorted(path.name for path in folder.glob("model*.safetensors")
                    if _WEIGHTS.fullmatch(path.name) and path.name not in names)
    if others:
        raise UserError(f"{folder} holds two sets of weights, {names[0]} and {others[0]}, of which "
                        "one is not the model's"
                        + (f" ({index.name} does not name {others[0]})" if index.exists() else "")
                        + ": remove the one that is not")
    return [folder / name for name in names]


def check_weights(folder: Path) -> None:
    """Refuse weights that are stored as another thing than numbers; reads the headers alone.

    Raises:
        UserError: as :func:`weight_files`; a damaged file; tensors of a quantized model.
    """
    for path in weight_files(folder):
        with _damage_told(path), safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                kind = handle.get_slice(name).get_dtype()
                odd = kind not in _FLOATS and kind != "BOOL" and not _NO_WEIGHT.search(name)
                if odd or _OF_QUANTIZED.search(name):
                    raise UserError(f"the model in {folder} is quantized (its tensor '{name}' is "
                                    f"of type {kind}): {_QUANTIZED}")


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, as they are stored.

    Raises:
        UserError: as :func:`check_weights`, or a number that is not finite.
    """
    from safetensors.torch import load_file

    check_weights(folder)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with _damage_told(path):
            tensors.update(load_file(path))
    check_finite(tensors.items(), folder)
    return tensors


def check_finite(named: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Refuse weights with numbers that are not finite."""
    for name, tensor in named:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"the weights in {folder} are damaged: tensor '{name}' holds numbers "
                            "that are not finite; copy the model again")


def check_left_over(names: Iterable[str], folder: Path) -> None:
    """Refuse tensors that the model has no place for."""
    if left := sorted(names):
        more = f" and {len(left) - 1} others" if len(left) > 1 else ""
        raise UserError(f"the model that {folder / 'config.json'} describes has no place for the "
                        f"tensor '{left[0]}'{more}: without it this would be another model")


def check_tied(table: Tensor | None, head: Tensor | None, folder: Path) -> None:
    """Refuse an output matrix of its own where the configuration says that it is the input's."""
    if table is not None and head is not None and not torch.equal(table, head):
        raise UserError(f"{folder / 'config.json'} says that the output matrix is the embedding "
                        "('tie_word_embeddings'), but the weights hold two that differ, "
                        "'lm_head.weight' among them: set the key to false if both are right")


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """While a file is read: a damaged one is told in a sentence."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): copy or download it "
                        "again") from error
