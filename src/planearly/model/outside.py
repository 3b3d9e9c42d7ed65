"""Models of others: any causal model of `transformers`, held whole instead of mapped.

Our own :class:`~planearly.model.transformer.Transformer` is for fresh weights and projected
networks. A checkpoint that it cannot hold exactly keeps its own code: :class:`Outside` runs the
library's module and offers what training and evaluation ask of a model. Nothing here knows a family
of models. The library's forward pass is divided where the causal model calls its body: ``hidden``
is the body, ``logits`` is the causal model over given final states, with whatever it does to them
(biases, capped or scaled logits). So logits of a large vocabulary exist a few rows at a time.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planearly import tensors
from planearly.errors import UserError, refused
from planearly.model import flops, hf, parts, reading
from planearly.model.transformer import Shape, Transformer

_TRIAL = 8
"""Tokens of the trial that a model is held exactly."""


@dataclass(frozen=True)
class Configured:
    """What fixes a model of others: its own configuration, and the window that it is trained on.

    Takes the place of a :class:`~planearly.model.transformer.Shape`; parameters and operations are
    counted by :mod:`planearly.model.flops`, from the library's module without weights.
    """

    config: str
    """``config.json`` as one line of JSON, without the versions of who wrote it."""
    context: int
    vocab_size: int

    def to_dict(self) -> dict[str, object]:
        return {"outside": json.loads(self.config), "context": self.context,
                "vocab_size": self.vocab_size}

    @property
    def kind(self) -> str:
        """The family, such as ``qwen3``."""
        return str(json.loads(self.config).get("model_type"))


AnyShape = Shape | Configured


def shape_of(values: dict[str, Any]) -> AnyShape:
    """What :meth:`Shape.to_dict` or :meth:`Configured.to_dict` gave."""
    if "outside" not in values:
        return Shape(**values)
    config = json.dumps(values["outside"], sort_keys=True)
    return Configured(config, values["context"], values["vocab_size"])


AnyModel = Union[Transformer, "Outside"]


def build(shape: AnyShape, seed: int | None = None) -> AnyModel:
    """A model of a shape.

    Args:
        seed: of fresh weights; None: its weights are to be set.
    """
    if isinstance(shape, Shape):
        return Transformer(shape, seed or 0)
    if seed is None:
        return Outside(_empty(shape), shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Outside(_fresh(shape), shape)


def with_weights(shape: AnyShape, path: Path) -> AnyModel:
    """The model of a shape with the weights in a file.

    Raises:
        UserError: the file is missing, broken, or of another shape.
    """
    model = build(shape)
    tensors.set_weights(model, tensors.load_tensors(path)[0], path)
    return model


def shape_in(folder: Path, context: int) -> AnyShape:
    """The shape of the model in a folder, for windows of ``context``: ours if ours can hold it.

    Raises:
        UserError: as :func:`planearly.model.hf.read_shape` and :func:`configured`.
    """
    try:
        return replace(hf.read_shape(folder), context=context)
    except hf.CannotHold:
        return configured(folder, context)


def weights_in(folder: Path, context: int) -> tuple[AnyShape, dict[str, Tensor]]:
    """As :func:`shape_in`, and the parameters in float32 under the model's names.

    Raises:
        UserError: as :func:`planearly.model.hf.from_hf` and :func:`read`.
    """
    shape = shape_in(folder, context)
    if isinstance(shape, Shape):
        return shape, hf.from_hf(folder)[1]
    return shape, tensors.weights(read(folder, context))


def width_of(shape: AnyShape) -> int:
    """Width of a model's hidden states."""
    if isinstance(shape, Shape):
        return shape.d_model
    return int(_configuration(json.loads(shape.config)).get_text_config().hidden_size)


def alike(shape: AnyShape) -> Shape:
    """A model of ours of about the same cost: as many layers, parameters and entries, as wide."""
    if isinstance(shape, Shape):
        return shape
    config = _configuration(json.loads(shape.config)).get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = round((flops.non_embedding(shape) / layers - 4 * width**2) / (3 * width))
    heads = getattr(config, "num_attention_heads", None) or 1  # some have no attention
    return Shape(layers, width, heads, max(inner, 1), shape.vocab_size, shape.context)


def configured(folder: Path, context: int) -> Configured:
    """The shape of any causal model folder, from its configuration alone.

    Raises:
        UserError: no such folder, quantized, or not a causal model that `transformers` knows.
    """
    values = reading.config(folder)
    hf.check_known(values, folder)
    from transformers import AutoModelForCausalLM

    with refused(f"transformers cannot read {folder / 'config.json'}"):
        config = _configuration(values)
        text = config.get_text_config()
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"the model in {folder} is a '{config.model_type}', which transformers "
                        "does not know as a causal language model: take one that continues text")
    said = {"vocab_size": getattr(text, "vocab_size", None)}
    most = getattr(text, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < context:
        raise UserError(f"the model in {folder} reads {most} tokens, fewer than {context}: set "
                        f"'context={most}' or less")
    return _shape(values, reading.number(said, "vocab_size", folder), context)


def read(folder: Path, context: int) -> Outside:
    """The model in a folder, in float32, on the CPU.

    Raises:
        UserError: as :func:`planearly.model.hf.load`; or a model that keeps numbers outside its
            parameters, or whose forward pass does not divide into body and head.
    """
    loaded, _ = hf.load(folder, torch.float32)
    model = hold(loaded.to("cpu"), context, configured(folder, context))
    if model is None:
        raise UserError(f"the model in {folder} cannot be trained: its output matrix is not "
                        "applied to the last states of its body alone; take another model")
    kept = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if other := sorted(model.theirs.state_dict().keys() - kept):
        raise UserError(f"the model in {folder} keeps '{other[0]}', which is no parameter and "
                        "would be lost in training: take another model")
    return model


def hold(theirs: Any, context: int, shape: Configured | None = None) -> Outside | None:
    """A causal model of `transformers`, held whole; None where it does not divide exactly.

    Args:
        shape: as its folder says (None: as the model itself does).
    """
    shape = shape or _shape(
        theirs.config.to_dict(), theirs.config.get_text_config().vocab_size, context)
    if not hasattr(theirs, theirs.base_model_prefix):
        return None
    model = Outside(theirs, shape)
    device = next(theirs.parameters()).device
    tokens = torch.arange(_TRIAL, device=device)[None] % shape.vocab_size
    with torch.no_grad():
        whole = theirs(input_ids=tokens, use_cache=False).logits
        try:
            apart = (model(tokens) - whole).abs().max()
        # foreign code that was not made to be called in two parts; our two are held by the tests
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return None
    return model if apart <= 1e-5 else None


def layers(model: AnyModel) -> list[nn.Module]:
    """The layers that a model is made of, first to last; none where they are not found."""
    if isinstance(model, Transformer):
        return list(model.blocks)
    count = model.theirs.config.get_text_config().num_hidden_layers
    return next((list(module) for module in model.theirs.modules()
                 if isinstance(module, nn.ModuleList) and len(module) == count), [])


class Outside(nn.Module):
    """A causal model of `transformers` as the loop, the evaluation and the objectives see a model.

    Parameters go by the library's names; of tied ones the first counts. It stays in the library's
    evaluation mode: a checkpoint's dropout was for another corpus, and would make a resumed run
    another one.
    """

    def __init__(self, theirs: Any, shape: Configured) -> None:
        super().__init__()
        self.theirs, self.shape = theirs, shape
        self._body = theirs.base_model_prefix
        for module in theirs.modules():
            if isinstance(module, nn.Embedding):
                _elementwise(module)
        if (head := theirs.get_output_embeddings()) is not None:
            _elementwise(head)
        self.train(False)

    def train(self, mode: bool = True) -> Outside:
        super().train(False)
        return self

    def named_parameters(self, prefix: str = "", recurse: bool = True,
                         remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        return self.theirs.named_parameters(prefix, recurse, remove_duplicate)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Final states [rows, time, width] of token ids [rows, time]."""
        return getattr(self.theirs, self._body)(input_ids=inputs, use_cache=False)[0]

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., vocab_size] of final states [..., width]."""
        body = self.theirs._modules[self._body]
        self.theirs._modules[self._body] = _Given(states.reshape(1, -1, states.shape[-1]))
        try:
            logits = self.theirs(input_ids=states.new_zeros(1, 1, dtype=torch.int64),
                                 use_cache=False).logits
        finally:
            self.theirs._modules[self._body] = body
        return logits.reshape(*states.shape[:-1], logits.shape[-1])

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """What ``logits`` is made of."""
        body = {id(p) for p in getattr(self.theirs, self._body).parameters()}
        own = [p for p in self.theirs.parameters() if id(p) not in body]
        table = self.theirs.get_output_embeddings()
        return [*own, *(p for p in (table.parameters() if table is not None else ())
                        if id(p) in body)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [rows, time, vocab_size] of token ids [rows, time]."""
        return self.logits(self.hidden(inputs))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum, in float32, of the next-token cross-entropies in nats; as :meth:`Transformer.loss`.
        """
        def nats(logits: Tensor, wanted: Tensor, _: parts.Place) -> Tensor:
            return F.cross_entropy(logits.float(), wanted, reduction="sum")

        states = self.hidden(inputs).flatten(0, 1)
        return parts.summed(self, states[:, None], targets.flatten()[:, None], nats)


class _Given(nn.Module):
    """In the place of a causal model's body: answers with final states that are there already."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> Any:
        return _states_type()(last_hidden_state=self.states)


@functools.cache
def _states_type() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class States(BaseModelOutputWithPast):
        """A body's answer; what a family adds to it is absent."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return States


def _elementwise(module: nn.Module) -> None:
    """A table is looked up, not multiplied by: never Muon's."""
    for parameter in module.parameters():
        parameter.elementwise = True  # type: ignore[attr-defined]


# Counting ---------------------------------------------------------------------------------------

def _shape(config: dict[str, Any], entries: int, context: int) -> Configured:
    values = {key: value for key, value in config.items()
              if key not in ("_name_or_path", "transformers_version")}
    return Configured(json.dumps(values, sort_keys=True, default=str), context, entries)


def _configuration(values: dict[str, Any]) -> Any:
    """The library's configuration of what a ``config.json`` holds."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))


def _fresh(shape: Configured, **options: Any) -> Any:
    """The library's module with weights as it draws them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        _configuration(json.loads(shape.config)), dtype=torch.float32, **options)


def _empty(shape: Configured, **options: Any) -> Any:
    """The library's module with memory for its weights, and nothing in it."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = _fresh(shape, **options)
    model.tie_weights()
    return model


@contextlib.contextmanager
def without_weights(shape: Configured) -> Iterator[Outside]:
    """The model with shapes instead of numbers, to be counted: nothing is computed in here.

    Attention is written out, so that its products count as what they are.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield Outside(_empty(shape, attn_implementation="eager"), shape)


def matrices(model: Outside) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every matrix layer but the output matrix, by the layer's name."""
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.theirs.named_modules():
        if module is model.theirs.get_output_embeddings():
            continue
        if isinstance(module, nn.Linear):
            found[name] = module.in_features, module.out_features
        elif isinstance(module, Conv1D):  # GPT-2's, stored the other way round
            found[name] = module.nx, module.nf
    return found


@functools.lru_cache(maxsize=16)
def _counts(shape: Configured) -> tuple[int, int]:
    """All parameters; those outside embeddings and output matrix."""
    with without_weights(shape) as model:
        total = sum(p.numel() for p in model.parameters())
        looked_up = [m for m in model.theirs.modules() if isinstance(m, nn.Embedding)]
        tables = {id(m.weight): m.weight.numel()
                  for m in (*looked_up, model.theirs.get_output_embeddings()) if m is not None}
    return total, total - sum(tables.values())


@functools.lru_cache(maxsize=16)
def _forward(shape: Configured) -> int:
    """Operations of a forward pass per token of a full window; attention as the full square."""
    from torch.utils.flop_counter import FlopCounterMode

    with without_weights(shape) as model, torch.no_grad():
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.zeros(1, shape.context, dtype=torch.int64))
    return round(counter.get_total_flops() / shape.context)


@flops.parameters.register
def _parameters(shape: Configured) -> int:
    return _counts(shape)[0]


@flops.non_embedding.register
def _non_embedding(shape: Configured) -> int:
    return _counts(shape)[1]


@flops.forward.register
def _forward_of(shape: Configured, causal: bool = False) -> int:
    return _forward(shape)
