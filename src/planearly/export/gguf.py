"""A model folder as one GGUF file, which llama.cpp, and what builds on it, runs.

llama.cpp's own converter comes with its sources alone, knows byte-level tokenizers by those it has
met, and leaves out the token that begins a document. This one writes what planearly makes: the
Llama or Arcee of :mod:`planearly.model.hf` with the tokenizer of :mod:`planearly.data.tokenizer`.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from planearly import files
from planearly.data import tokenizer
from planearly.errors import UserError
from planearly.export.tokens import begins_itself, special_tokens
from planearly.model import flops, hf
from planearly.model.outside import AnyShape
from planearly.model.transformer import Shape

KINDS = ("f32", "f16", "bf16", "q8_0")
"""Of numbers, by llama.cpp's names; the last is 8 bits in blocks of 32."""

CONVERTER = "python llama.cpp/convert_hf_to_gguf.py MODEL_FOLDER --outfile model.gguf"
"""llama.cpp's own, for tokenizers that it has met."""
_MIXED = re.compile(r"i?q\d_(k|xs|xxs|s|m|nl|[01])")
"""Kinds that choose among numbers by what a matrix is for: llama-quantize's work."""
_DIGITS_THEN_BYTES = "smollm"
"""llama.cpp's name for our pre-tokenizer: digits one by one, then byte-level."""


def obstacle(shape: AnyShape, spec: dict[str, Any]) -> str | None:
    """Why :func:`write` cannot take this model, as a clause; None where it can.

    Args:
        spec: what ``tokenizer.json`` holds.
    """
    if not isinstance(shape, Shape):
        return f"it is a '{shape.kind}' model: use llama.cpp's own converter, {CONVERTER}"
    if shape.ffn == "gelu":
        return ("llama.cpp computes every Arcee model with a squared ReLU, and this one has a "
                "GELU")
    model = spec["model"]
    if model.get("type", "BPE" if "merges" in model else "") != "BPE":  # older files name none
        return ("its tokenizer is not a byte-level BPE: where it has a tokenizer.model too, use "
                f"llama.cpp's own converter, {CONVERTER}")
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers", [])
    digits, bytes_ = (steps[0], steps[1]) if len(steps) == 2 else ({}, {})
    if not (digits.get("type") == "Digits" and digits.get("individual_digits")
            and bytes_.get("type") == "ByteLevel" and bytes_.get("use_regex", True)
            and not bytes_.get("add_prefix_space") and not spec.get("normalizer")):
        return f"its tokenizer is not planearly's: use llama.cpp's own converter, {CONVERTER}"
    return None


def write(folder: Path, out: Path, kind: str = "f16") -> Path:
    """Write the model in ``folder`` as the GGUF file ``out``, at once or not at all.

    Norms stay in float32, and with ``q8_0`` so does a matrix whose rows 32 does not divide.

    Args:
        kind: of the matrices' numbers, one of :data:`KINDS` in any case.

    Raises:
        UserError: an unknown kind; not a Llama or Arcee folder, or one with an :func:`obstacle`;
            ``out`` is something else than a GGUF file.
    """
    import gguf

    files.check_place(out, "a GGUF file", _is_gguf)
    kind = kind.lower() if kind.lower() in KINDS else kind  # llama-quantize writes Q8_0
    if kind not in KINDS and _MIXED.match(kind.lower()):
        raise UserError(f"planearly writes {', '.join(KINDS)}; for {kind} write f16 and let "
                        f"llama.cpp make it: llama-quantize {shlex.quote(str(out))} "
                        f"{shlex.quote(str(out.with_suffix('')))}-{kind}.gguf {kind}")
    if kind not in KINDS:
        raise UserError(f"there are no weights of kind '{kind}'; choose from {', '.join(KINDS)}")
    try:
        shape, state = hf.from_hf(folder)
    except hf.CannotHold as error:
        raise UserError(f"{error}; llama.cpp's own converter may write it as a GGUF file: "
                        f"{_naming(folder, CONVERTER)}") from None
    ends = special_tokens(folder, shape.vocab_size)
    spec = files.read_json(folder / "tokenizer.json")
    if why := obstacle(shape, spec):
        raise UserError(f"{folder} cannot become a GGUF file: {_naming(folder, why)}")
    arch = gguf.MODEL_ARCH.LLAMA if shape.ffn == "swiglu" else gguf.MODEL_ARCH.ARCEE
    with files.atomic_write(out) as handle:
        writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
        writer.add_name(out.stem)
        writer.add_size_label(gguf.size_label(flops.parameters(shape), 0, 0, 0))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_card(writer, _front_matter(folder / "README.md"))
        writer.add_context_length(shape.context)
        writer.add_embedding_length(shape.d_model)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.d_ff)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads or shape.heads)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_theta)
        writer.add_layer_norm_rms_eps(shape.norm_eps)
        writer.add_vocab_size(shape.vocab_size)
        writer.add_file_type(gguf.LlamaFileType[
            "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
        _add_tokenizer(writer, spec, shape.vocab_size, ends, begins_itself(folder, ends[0]))
        names = gguf.get_tensor_name_map(arch, shape.layers)
        for name, tensor in hf.to_hf(state, shape).items():
            data = _interleaved(name, tensor.numpy(), shape)
            target = gguf.GGMLQuantizationType[kind.upper() if data.ndim > 1 else "F32"]
            if data.shape[-1] % gguf.GGML_QUANT_SIZES[target][0]:
                target = gguf.GGMLQuantizationType.F32
            writer.add_tensor(str(names.get_name(name, (".weight",))),
                              gguf.quants.quantize(data, target), raw_dtype=target)
        writer.write_header_to_file(Path(handle.name))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def _naming(folder: Path, told: str) -> str:
    """A sentence with :data:`CONVERTER` in it, as a command for this folder."""
    return told.replace("MODEL_FOLDER", shlex.quote(str(folder)))


def _is_gguf(path: Path) -> bool:
    with open(path, "rb") as handle:
        return handle.read(4) == b"GGUF"


def modelfile(folder: Path, model: Path) -> Path:
    """Write the Modelfile that Ollama runs a GGUF file by, beside it: plain continuation.

    Args:
        folder: the model folder that ``model`` was written from.

    Returns:
        The file ``Modelfile``.

    Raises:
        UserError: there is one already, of another model.
    """
    shape = hf.read_shape(folder)
    end = tokenizer.load(folder).id_to_token(special_tokens(folder, shape.vocab_size)[1])
    path = model.with_name("Modelfile")
    first = f"FROM ./{model.name}\n"
    files.check_place(path, f"the Modelfile of {model.name}",
                      lambda there: there.read_bytes().startswith(first.encode()))
    with files.atomic_write(path, "w") as handle:
        handle.write(first +
                     'TEMPLATE """{{ .Prompt }}"""\n'
                     f"PARAMETER num_ctx {shape.context}\n"
                     f"PARAMETER stop {json.dumps(end)}\n")
    return path


def _front_matter(card: Path) -> dict[str, Any]:
    """What a model card says of itself; nothing where there is none or it cannot be read."""
    if not card.is_file():
        return {}
    parts = card.read_text("utf-8", errors="replace").split("---\n", 2)
    try:
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _add_card(writer: Any, front: dict[str, Any]) -> None:
    """Licence, origin, languages and tags of a card's front matter."""
    def texts(key: str) -> list[str]:
        value = front.get(key)
        return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]

    for licence in texts("license")[:1]:
        writer.add_license(licence)
    for add, key in ((writer.add_languages, "language"), (writer.add_tags, "tags")):
        if found := texts(key):
            add(found)
    if bases := texts("base_model"):
        writer.add_base_model_count(len(bases))
    for i, base in enumerate(bases):
        writer.add_base_model_name(i, base.rpartition("/")[2])
        if base.count("/") == 1:
            writer.add_base_model_organization(i, base.partition("/")[0])
            writer.add_base_model_repo_url(i, f"https://huggingface.co/{base}")


def _interleaved(name: str, weight: np.ndarray, shape: Shape) -> np.ndarray:
    """Rows of queries and keys as llama.cpp rotates them: neighbours, not halves of a head."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    halves = weight.reshape(-1, 2, shape.head_dim // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: Any, spec: dict[str, Any], entries: int, ends: tuple[int, int],
                   begins: bool) -> None:
    """Tokens with their kinds, merges, and the tokens that begin and end a document.

    Args:
        begins: the first of them is put before a text, as the folder's tokenizer does.
    """
    from gguf import TokenType

    kinds = [TokenType.UNUSED] * entries
    tokens = [f"[PAD{i}]" for i in range(entries)]
    for token, i in spec["model"]["vocab"].items():
        tokens[i], kinds[i] = token, TokenType.NORMAL
    for added in spec.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge)
              for merge in spec["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_DIGITS_THEN_BYTES)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(ends[0])
    writer.add_eos_token_id(ends[1])
    writer.add_add_bos_token(begins)
