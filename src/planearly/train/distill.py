"""Distillation: the student learns from the data and from a teacher's next-token distribution.

Per real target, with teacher p and student q both at temperature T (Hinton et al. 2015; the paper's
SLM-d, section 3):

    data_weight * -ln q_1(target) + teacher_weight * T^2 * KL(p_T || q_T)

where q_1 is the student at temperature 1; T^2 keeps the gradient's size. The teacher answers live,
or its k largest probabilities are computed once for every row of a small set and looked up.

What the top k lose: the k largest probabilities and the mass of all others stay exact, but how the
teacher divides that mass among the others is forgotten. It is compared in one bucket with the mass
that the student gives to the same tokens; inside the bucket the student keeps its own proportions.
The divergence is therefore at most the live one (merging outcomes never raises KL), and equal to it
when k is the vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from planearly import company, keys, parallel
from planearly.data.streams import RowStream
from planearly.files import atomic_write, read_array, read_object, write_json
from planearly.model import outside, parts
from planearly.model.outside import AnyModel, AnyShape
from planearly.progress import progress


class Taught(NamedTuple):
    """A teacher's distribution at some positions ``[...]``, in nats."""

    log_p: Tensor
    """``[..., vocabulary]``, or ``[..., k]`` of the tokens in ``ids``."""
    ids: Tensor | None = None
    """int64 ``[..., k]``; None: all tokens in order."""
    log_rest: Tensor | None = None
    """``[...]``: log of the probability of all tokens that ``ids`` lacks."""

    def at(self, places: Tensor) -> Taught:
        ids, rest = self.ids, self.log_rest
        return Taught(self.log_p[places], None if ids is None else ids[places],
                      None if rest is None else rest[places])


class Teacher(Protocol):
    """Answers for token ids int64 ``[rows, time]`` of whole rows."""

    flops_per_token: float
    """Spent per token of training."""
    flops_before: float
    """Spent once, before training."""
    seconds_before: float
    shape: AnyShape | None
    """Of a model that is run beside the student, if it is known."""
    width: int | None
    """Of the model that answers, or did; None: it is not known."""

    def __call__(self, inputs: Tensor) -> Taught: ...


class Live:
    """A model that is run beside the student."""

    flops_before = seconds_before = 0.0

    def __init__(self, forward: Callable[[Tensor], Tensor], vocab_size: int, temperature: float,
                 flops_per_token: float, shape: AnyShape | None = None) -> None:
        """
        Args:
            forward: token ids -> logits ``[rows, time, at least vocab_size]``; rows of padding that
                some models add at the end of their output matrix are left out.
        """
        self.forward, self.vocab_size, self.temperature = forward, vocab_size, temperature
        self.flops_per_token, self.shape = flops_per_token, shape
        self.width = None if shape is None else outside.width_of(shape)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Taught:
        logits = _wide(self.forward(inputs)[..., :self.vocab_size])
        return Taught(F.log_softmax(logits / self.temperature, -1))


class Stored:
    """What :func:`store` wrote.

    Rows are found by a hash of their tokens, which is all that a teacher's answer depends on: they
    may come in any order, in any batch, from any process.
    """

    flops_per_token = 0.0
    shape: AnyShape | None = None

    def __init__(self, folder: Path) -> None:
        note = read_object(folder / "stored.json", "flops", "seconds")
        self.flops_before, self.seconds_before = note["flops"], note["seconds"]
        self.width: int | None = note.get("width")  # which older versions did not tell
        keys = read_array(folder / "keys.npy", mapped=False)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._ids, self._log_p, self._log_rest = (
            read_array(folder / f"{name}.npy") for name in ("ids", "log_p", "log_rest"))

    def __call__(self, inputs: Tensor) -> Taught:
        wanted = row_keys(inputs.cpu().numpy())
        place = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        if (self._keys[place] != wanted).any():
            raise KeyError("a row was never stored")
        rows = self._order[place]
        ids = torch.from_numpy(self._ids[rows].astype(np.int64))
        log_p, log_rest = (torch.from_numpy(array[rows]) for array in (self._log_p, self._log_rest))
        return Taught(*(part.to(inputs.device) for part in (log_p, ids, log_rest)))


def row_keys(inputs: np.ndarray) -> np.ndarray:
    """uint64 ``[rows]``: a hash of each row's tokens, int64 ``[rows, time]``."""
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest()
               for row in np.ascontiguousarray(inputs))
    return np.frombuffer(b"".join(digests), np.uint64)


def largest(taught: Taught, k: int) -> Taught:
    """The k most probable tokens of a whole distribution, and the mass of the others."""
    log_p, ids = taught.log_p.topk(k, -1)
    rest = taught.log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return Taught(log_p, ids, rest)


def store(teacher: Live, stream: RowStream, k: int, folder: Path,
          context: Callable[[], contextlib.AbstractContextManager[Any]], device: torch.device,
          ) -> None:
    """Write the teacher's k largest probabilities at every position of every row of a stream.

    ``ids`` (uint16, or uint32 above 65,536 tokens), ``log_p`` float32 ``[rows, context, k]``,
    ``log_rest`` float32 ``[rows, context]``, ``keys`` uint64 ``[rows]``; ``stored.json`` last.

    Args:
        context: what forward passes run in (autocast).
    """
    if (folder / "stored.json").exists():
        return
    began = company.device_time()
    rows, k = len(stream.rows), min(k, teacher.vocab_size)
    wide_ids = np.dtype(np.uint16 if teacher.vocab_size <= 1 << 16 else np.uint32)
    shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        "keys": (np.dtype(np.uint64), (rows,)),
        "ids": (wide_ids, (rows, stream.context, k)),
        "log_p": (np.dtype(np.float32), (rows, stream.context, k)),
        "log_rest": (np.dtype(np.float32), (rows, stream.context)),
    }
    per_pass = parts.rows_at_once(stream.context, teacher.vocab_size)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(atomic_write(folder / f"{name}.npy")) for name in shapes}
        meter = stack.enter_context(progress("the teacher's answers", rows * stream.context,
                                             "tokens"))
        for name, (dtype, shape) in shapes.items():
            np.lib.format.write_array_header_1_0(files[name], {
                "descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                "shape": shape})
        for start in range(0, rows, per_pass):
            inputs, _ = stream.dataset.rows(
                [stream.rows.row(row) for row in range(start, min(start + per_pass, rows))])
            with context():
                taught = largest(teacher(torch.from_numpy(inputs).to(device)), k)
            answer = {"keys": row_keys(inputs), "ids": taught.ids, "log_p": taught.log_p,
                     "log_rest": taught.log_rest}
            for name, part in answer.items():
                array = part.cpu().numpy() if isinstance(part, Tensor) else part
                assert array is not None
                files[name].write(array.astype(shapes[name][0]).tobytes())
            meter.advance(inputs.size)
    tokens = rows * stream.context
    write_json(folder / "stored.json", {
        "k": k, "rows": rows, "tokens": tokens, "flops": tokens * teacher.flops_per_token,
        "seconds": (company.device_time() - began) * parallel.on_device(), "width": teacher.width})


def divergence(taught: Taught, logits: Tensor) -> Tensor:
    """KL(teacher || student) in nats at each position.

    Args:
        taught: the teacher at the temperature of ``logits``.
        logits: the student's, divided by the temperature, ``[..., vocabulary]``.
    """
    if taught.ids is None:
        return (taught.log_p.exp() * (taught.log_p - F.log_softmax(logits, -1))).sum(-1)
    whole = logits.logsumexp(-1)
    log_q = logits.gather(-1, taught.ids) - whole[..., None]
    apart = (taught.log_p.exp() * (taught.log_p - log_q)).sum(-1)
    if taught.log_rest is None or taught.ids.shape[-1] == logits.shape[-1]:
        return apart
    rest = logits.scatter(-1, taught.ids, -torch.inf).logsumexp(-1) - whole
    return apart + taught.log_rest.exp() * (taught.log_rest - rest)


class Distillation:
    """The objective of a distilled student: a sum over real targets, as every objective is.

    Works through the rows a few at a time, so that only a few hundred megabytes of logits exist at
    once, however large the microbatch and the vocabulary.
    """

    def __init__(self, teacher: Teacher, settings: keys.Distill,
                 entries: int | None = None) -> None:
        """
        Args:
            entries: of the vocabulary (None: all of the student's output matrix); rows beyond are
                padding, about which a teacher says nothing.
        """
        self.teacher, self.settings, self.entries = teacher, settings, entries
        self.flops_per_token = teacher.flops_per_token
        self.flops_before = teacher.flops_before
        self.seconds_before = teacher.seconds_before
        self.teacher_shape, self.teacher_width = teacher.shape, teacher.width

    def __call__(self, model: AnyModel, inputs: Tensor, targets: Tensor) -> Tensor:
        def part(logits: Tensor, wanted: Tensor, place: parts.Place) -> Tensor:
            rows, real = place
            return self.loss(logits, wanted, self.teacher(inputs[rows]).at(real))

        return parts.summed(model, model.hidden(inputs), targets, part)

    def loss(self, logits: Tensor, targets: Tensor, taught: Taught) -> Tensor:
        """Of the student's logits ``[n, vocabulary]`` at n real targets ``[n]``."""
        logits = _wide(logits)
        settings, heat = self.settings, self.settings.temperature
        data = F.cross_entropy(logits, targets, reduction="sum")
        apart = divergence(taught, logits[..., :self.entries] / heat).sum()
        return settings.data_weight * data + settings.teacher_weight * heat**2 * apart


def _wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
