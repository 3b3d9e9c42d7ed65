"""Projected networks: many small experts in one set of weights (paper, section 3).

The matrix l of expert i is W(l, i) = sum_r (E_i M(l))_r T(l)_r: one vector E_i per expert, one
matrix M(l) and one bank of slices T(l) per projected matrix. Everything else (embeddings,
attention, norms) is shared. Every training window runs through the expert of its own cluster; or,
of a network trained on blends (Soup-of-Experts, Ablin et al. 2025), through the average of the
experts, weighted by the histogram over clusters that it was drawn by.

Projecting an expert costs the operations of a handful of tokens but moves the whole bank through
memory, so it is done once per optimiser step: one product makes the dense weights of all clusters
in the step, microbatches run an ordinary dense model over them, whose gradients gather per cluster,
and two products return these to the bank and the coefficients at the end. A microbatch holds rows
of several clusters, sorted; only the projected matrices see the difference.

Where several processes divide the bank, each has some output rows of all its slices, projects these
rows for the clusters of all processes, and receives the others'; it gets back its rows of the sum
of all processes' gradients. So the bank itself never travels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from planearly import keys, parallel, sharding, tensors
from planearly.errors import UserError, flattened
from planearly.model.grouped import GroupedLinear
from planearly.model.transformer import FFN_MATRICES, Shape, Transformer, initial_std
from planearly.progress import say


def projected_names(shape: Shape, settings: keys.Projected) -> list[str]:
    """Names, in the dense model, of the matrices that a recipe projects.

    Raises:
        UserError: an unknown matrix or layer, or nothing to project.
    """
    known = sorted(set().union(*FFN_MATRICES.values()))
    for matrix in settings.matrices:
        if matrix not in known:
            raise UserError(f"recipe key 'projected.matrices' holds '{matrix}'; "
                            f"choose from {', '.join(known)}")
    layers = range(shape.layers) if settings.layers is None else settings.layers
    for layer in layers:
        if not 0 <= layer < shape.layers:
            raise UserError(f"recipe key 'projected.layers' holds {layer}; "
                            f"the model's layers are 0 to {shape.layers - 1}: name some of these")
    names = [f"blocks.{layer}.ffn.{matrix}.weight" for layer in sorted(set(layers))
             for matrix in FFN_MATRICES[shape.ffn] if matrix in settings.matrices]
    if not names:
        raise UserError("recipe keys 'projected.matrices' and 'projected.layers' leave nothing to "
                        f"project in a model with a {shape.ffn} feed-forward: name at least one "
                        f"of its layers and of {', '.join(FFN_MATRICES[shape.ffn])}")
    return names


def by_group(groups: np.ndarray, rows: int) -> list[np.ndarray]:
    """Divide rows, given by their groups, into index arrays of one group and at most ``rows``.

    Each group's are about equally many.
    """
    order = np.argsort(groups, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    return [piece for part in parts for piece in np.array_split(part, math.ceil(len(part) / rows))]


class Bank(nn.Module):
    """What replaces one projected matrix: ``slices`` T [h, out, in] and ``mixing`` M [m, h]."""

    def __init__(self, size: Sequence[int], settings: keys.Projected, hidden: bool) -> None:
        """
        Args:
            hidden: whether it acts on hidden activations, as neither a norm nor a table does.
        """
        super().__init__()
        self.slices = nn.Parameter(torch.empty(settings.slices, *size))
        self.mixing = nn.Parameter(torch.empty(settings.embedding, settings.slices))
        _mark(self.slices, settings.bank_lr, elementwise=not hidden)
        _mark(self.mixing, settings.coefficient_lr)


@dataclass
class _Projection:
    """Dense weights of the clusters of a step, for one projected matrix."""

    coefficients: Tensor
    """[n, h]"""
    weights: Tensor
    """[n, out * in]"""
    gradients: Tensor | None
    """As ``weights``; sums over the step's microbatches."""


class Projected(nn.Module):
    """All experts of a projected network; a :class:`planearly.train.trainable.Trainable`.

    ``body`` is the dense model. Its shared parameters are this module's own; in place of each
    projected one it holds a leaf tensor of the cluster selected last.

    Attributes:
        blends: float32 [n, k], histograms over clusters: then a row's group is the number of one,
            and it trains the blend; None: a row's group is a cluster.
    """

    def __init__(self, shape: Shape, settings: keys.Projected, seed: int = 0,
                 names: Sequence[str] | None = None) -> None:
        """
        Args:
            names: parameters of the dense model to project, instead of those of the recipe.

        Raises:
            UserError: settings that do not fit the shape.
        """
        super().__init__()
        self.shape, self.settings = shape, settings
        self.names = projected_names(shape, settings) if names is None else list(names)
        self.experts = nn.Parameter(torch.empty(settings.experts, settings.embedding))
        _mark(self.experts, settings.coefficient_lr)
        self.body = Transformer(shape, seed)
        self.banks = nn.ModuleDict()
        self._places: list[tuple[nn.Module, str]] = []
        for name in self.names:
            owner, _, attribute = name.rpartition(".")
            place = self.body.get_submodule(owner)
            size = getattr(place, attribute).shape
            table = name in ("embed.weight", "head.weight")
            self.banks[_key(name)] = Bank(size, settings, len(size) == 2 and not table)
            # from here on no parameter of this module: a plain attribute, bound step by step
            if isinstance(place, nn.Linear):
                place = GroupedLinear()
                self.body.set_submodule(owner, place)
            else:
                delattr(place, attribute)
            setattr(place, attribute, None)
            self._places.append((place, attribute))
        self._grouped = all(isinstance(place, GroupedLinear) for place, _ in self._places)
        self.blends: Tensor | None = None
        self._divided = False
        self._slot: dict[int, int] = {}
        self._here = torch.empty(0)
        self._vectors = torch.empty(0)
        self._projections: list[_Projection] = []
        self.initialise(seed)

    @property
    def module(self) -> nn.Module:
        return self

    def bank(self, name: str) -> Bank:
        """The bank of a projected parameter, by its name in the dense model."""
        bank = self.banks[_key(name)]
        assert isinstance(bank, Bank)
        return bank

    def train_on(self, histograms: Tensor) -> Projected:
        """Train the blends of these histograms [n, k] of any positive scale; returns itself."""
        self.blends = (histograms / histograms.sum(1, keepdim=True)).float()
        return self

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw fresh experts, each a well-scaled plain model; a function of the seed and settings.

        Slices are drawn as plain layers are; an expert's matrix then has a plain layer's variance
        times the squared norm of its coefficients alpha_i = E_i M, which is one: E_i is a unit
        vector and the rows of M that it meets are orthonormal (with m > h only h of them can be, so
        E starts in the first h coordinates). E_i is a part shared by all experts and one of its
        own, with the share ``deviation`` of the square.
        """
        generator = torch.Generator().manual_seed(seed + 0x504E)
        k, m = self.experts.shape
        used = min(m, self.settings.slices)
        deviation = self.settings.deviation if k > 1 and used > 1 else 0.0
        own = torch.randn(k, used - 1, generator=generator)
        self.experts.zero_()
        self.experts[:, 0] = math.sqrt(1 - deviation)
        self.experts[:, 1:used] = own * (math.sqrt(deviation) / own.norm(dim=1, keepdim=True))
        for name in self.names:
            bank = self.bank(name)
            bank.mixing.normal_(0.0, self.settings.slices ** -0.5, generator=generator)
            nn.init.orthogonal_(bank.mixing[:used], generator=generator)
            matrix = bank.slices[0]
            if matrix.dim() == 1:  # of a norm
                bank.slices.fill_(1.0)
            else:
                std = initial_std(name, matrix, self.shape)
                bank.slices.normal_(0.0, std, generator=generator)

    def coefficients(self, vectors: Tensor) -> dict[str, Tensor]:
        """alpha [n, h] of every projected matrix, of expert vectors [n, m]."""
        return {name: vectors @ self.bank(name).mixing for name in self.names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projected:
        """What moves a module, to a device too: the kernels are tried there before any step."""
        super()._apply(fn, recurse)
        _kernels(self.experts.device)
        return self

    # Training: planearly.train.trainable.Trainable ---------------------------------------------

    undivided = None

    def divide(self, bf16: bool) -> bool:
        """Divide the banks among the processes; all else, which a small model has too, stays whole.
        """
        for name in self.names:
            bank = self.bank(name)
            if bank.slices.dim() == 3:
                bank.slices = sharding.divide(bank.slices, dim=1)
        _kernels(parallel.device())
        self._divided = True
        return False

    def microbatches(self, groups: np.ndarray, rows: int) -> list[np.ndarray]:
        """Rows sorted by cluster, in equal parts (one cluster each where norms, say, differ too).
        """
        if not self._grouped:
            return by_group(groups, rows)
        return np.array_split(np.argsort(groups, kind="stable"), math.ceil(len(groups) / rows))

    def begin(self, groups: np.ndarray) -> None:
        """Project the experts, or blends, of a step's groups.

        Raises:
            UserError: a row belongs to no cluster of this network.
        """
        here = np.unique(groups)
        count = len(self.experts if self.blends is None else self.blends)
        if len(here) and not (here[0] >= 0 and here[-1] < count):
            raise UserError(
                f"a training row is of cluster {here[0] if here[0] < 0 else here[-1]} "
                f"and the projected network has experts 0 to {count - 1}: train it on "
                "generic text alone, clustered into as many clusters as it has experts"
            )
        if self._divided:
            here = np.flatnonzero(parallel.sum_scalars(*np.bincount(here, minlength=count)))
        self._slot = {int(group): slot for slot, group in enumerate(here)}
        number, experts = torch.from_numpy(here), self.experts.detach()
        self._here = parallel.send(number if self.blends is None else
                                   self.blends[number].to(experts.dtype), experts.device)
        self.project(experts[self._here] if self.blends is None else self._here @ experts)

    def select(self, groups: np.ndarray) -> None:
        """Let the body run rows of these groups of the step, sorted, as ``microbatches`` does."""
        assert np.all(np.diff(groups) >= 0)
        slots = np.array([self._slot[int(group)] for group in groups])
        self.bind(int(slots[0]), np.bincount(slots - slots[0]))  # others' in between have no rows

    @torch.no_grad()
    def end(self) -> None:
        """Return the gathered gradients to the bank, M and E."""
        gradient = self.return_gradients()
        _add_gradient(self.experts, self._here.T @ gradient if self.blends is not None else
                      torch.zeros_like(self.experts).index_copy(0, self._here, gradient))

    @torch.no_grad()
    def project(self, vectors: Tensor, gradients: bool = True) -> None:
        """Make the dense weights of expert vectors [n, m], for :meth:`bind`; slot i is vector i.

        Args:
            gradients: whether the body is to be trained, or only run.
        """
        self._vectors = vectors
        self._projections = []
        for name in self.names:
            bank = self.bank(name)
            coefficients = vectors @ bank.mixing
            slices = sharding.part(bank.slices)
            weights = _combine(coefficients, slices.flatten(1))
            if sharding.divided(bank.slices):
                weights = sharding.gathered(
                    weights.view(-1, *slices.shape[1:]), (len(vectors), *bank.slices.shape[1:]),
                    dim=1).flatten(1)
            self._projections.append(
                _Projection(coefficients, weights, torch.zeros_like(weights) if gradients else None)
            )

    def bind(self, slot: int, rows: Sequence[int] | np.ndarray = (1,)) -> None:
        """Make the vectors projected from ``slot`` on the body's weights, each for so many rows.

        As a single one it runs batches of any size. The weights are leaves whose ``grad`` is a part
        of one buffer, where backward passes add up.
        """
        n = len(rows)
        groups = torch.arange(n).repeat_interleave(torch.tensor(rows)) if n > 1 else None
        for (place, attribute), name, made in zip(
            self._places, self.names, self._projections, strict=True
        ):
            size = self.bank(name).slices.shape[1:]
            part, shape = slice(slot, slot + n), (n, *size) if n > 1 else size
            leaf = made.weights[part].view(shape).detach()
            if made.gradients is not None:
                leaf.requires_grad_().grad = made.gradients[part].view(shape)
            setattr(place, attribute, leaf)
            if isinstance(place, GroupedLinear):
                place.groups = groups

    @torch.no_grad()
    def return_gradients(self, bank_too: bool = True) -> Tensor:
        """From the dense weights' gradients, that [n, m] of the vectors projected; unbinds them.

        With W = C T, C = V M: dT = C^T dW, dC = dW T^T, dM = V^T dC, dV = dC M^T. Gradients of T
        and M are added to their ``grad``, if ``bank_too``. Of a divided T: that of T is the sum
        over the processes, and the others add up over them to theirs.
        """
        gradient = torch.zeros_like(self._vectors)
        for (place, attribute), name in zip(self._places, self.names, strict=True):
            setattr(place, attribute, None)
            bank, made = self.bank(name), self._projections.pop(0)
            weights = made.gradients
            assert weights is not None
            del made.weights  # its memory serves the bank's gradient
            slices = sharding.part(bank.slices)
            if sharding.divided(bank.slices):
                weights = sharding.summed_part(weights.view(-1, *bank.slices.shape[1:]),
                                               dim=1).flatten(1)
            by_coefficient = _inner(weights.view(-1, *slices.shape[1:]), slices)
            gradient += by_coefficient @ bank.mixing.T
            if bank_too:
                _add_gradient(bank.mixing, self._vectors.T @ by_coefficient)
                _add_gradient(bank.slices, sharding.as_part(
                    _combine(made.coefficients.T, weights).view_as(slices), bank.slices))
        return gradient

    # Experts -----------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """k, the number of experts."""
        return len(self.experts)

    def blend(self, share: Tensor) -> Tensor:
        """E* = sum_c p(c) E_c, a vector [m], of a histogram [k] of any positive scale.

        The projection is linear in E: the blended model's matrices are the experts' averages.
        """
        share = share.to(self.experts)
        return (share / share.sum()) @ self.experts.detach()

    def vector(self, expert: int | Tensor) -> Tensor:
        """The vector [m] of an expert given by number, or given as a vector already.

        Raises:
            UserError: there is no such expert.
        """
        if isinstance(expert, Tensor):
            return expert.to(self.experts)
        if not 0 <= expert < len(self.experts):
            raise UserError(f"there is no expert {expert}: "
                            f"this projected network has experts 0 to {len(self.experts) - 1}")
        return self.experts.detach()[expert]

    @torch.no_grad()
    def materialise(self, expert: int | Tensor) -> dict[str, Tensor]:
        """Weights of the small dense model of one expert, or of any vector [m], in closed form."""
        vector = self.vector(expert)
        dense = {name: p.detach().clone() for name, p in self.body.named_parameters()}
        for name, coefficients in self.coefficients(vector).items():
            dense[name] = torch.tensordot(coefficients, self.bank(name).slices, 1)
        return dense

    @classmethod
    def from_dense(cls, state: Mapping[str, Tensor], shape: Shape, settings: keys.Projected,
                   seed: int = 0, source: str = "the checkpoint") -> Projected:
        """A projected network whose experts are all exactly one dense model at the start.

        The first slice of a bank is the dense matrix, with coefficient one for every expert; the
        others are zero, with coefficients that differ per expert, so that the first step already
        moves the experts apart (as the zero matrix of LoRA's pair, Hu et al. 2021).

        Args:
            state: weights by the names of :class:`Transformer`.

        Raises:
            UserError: a tensor is missing or has another shape; a network of one slice.
        """
        check_dense_start(settings)
        made = cls(shape, settings, seed)
        dense = Transformer(shape)
        tensors.set_weights(dense, dict(state), source)
        weights = tensors.weights(dense)
        with torch.no_grad():
            for name, parameter in made.body.named_parameters():
                parameter.copy_(weights[name])
            made.experts[:, 1:] /= made.experts[:, :1]  # variance shares stay as in the recipe
            made.experts[:, 0] = 1.0
            for name in made.names:
                bank = made.bank(name)
                bank.slices.zero_()
                bank.slices[0] = weights[name]
                bank.mixing[0], bank.mixing[:, 0] = 0.0, 0.0
                bank.mixing[0, 0] = 1.0
        return made


def check_dense_start(settings: keys.Projected) -> None:
    """Refuse a network whose experts could never leave the dense model that they start from."""
    if (settings.rank or 2) < 2 or settings.embedding < 2:
        raise UserError("a projected network that starts from a dense model needs "
                        "'projected.rank' and 'projected.embedding' of at least 2")
    if settings.deviation == 0:
        raise UserError("a projected network that starts from a dense model needs "
                        "'projected.deviation' above 0: its experts would stay alike for ever")


def _key(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")


def _mark(parameter: nn.Parameter, scale: float, elementwise: bool = True) -> None:
    """Tell the optimiser: this rate, and whether to go element by element (coefficients do, being
    no matrices that act on activations).
    """
    parameter.lr_scale, parameter.elementwise = scale, elementwise  # type: ignore[attr-defined]


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if not parameter.requires_grad:
        return
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@functools.cache
def _kernels(device: torch.device) -> Any:
    """:mod:`planearly.model.kernels` if it works on this device, else None, told once.

    Raises:
        torch.OutOfMemoryError: the device's memory is full now, which says nothing of later.
    """
    if device.type != "cuda":
        return None
    try:
        from planearly.model import kernels

        kernels.check(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds, by what is missing or does not fit
        say(f"projected networks use torch's slower products on {device}: Triton does not work "
            f"({flattened(error)})")
        return None
    return kernels


def _kernels_for(tensor: Tensor, *rows: int) -> Any:
    """Those that multiply such a tensor, in so many rows of either factor; None: there are none."""
    kernels = _kernels(tensor.device) if tensor.dtype == torch.float32 else None
    return kernels if kernels and max(rows) <= kernels.MAX_ROWS else None


def _combine(left: Tensor, right: Tensor) -> Tensor:
    """[n, h] times [h, size], of some tens of rows with millions of columns each."""
    kernels = _kernels_for(right, *left.shape)
    made: Tensor = kernels.combine(left, right) if kernels else left @ right
    return made


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products [n, h] of tensors [n, ...] and [h, ...] of millions of numbers each."""
    if kernels := _kernels_for(right, len(left), len(right)):
        made: Tensor = kernels.inner(left.flatten(1), right.flatten(1))
        return made
    if right.device.type == "cuda" and right.dim() == 3:
        return _inner_by_rows(left, right)
    return left.flatten(1) @ right.flatten(1).T


def _inner_by_rows(left: Tensor, right: Tensor) -> Tensor:
    """As :func:`_inner`, of matrices: the sum of one product for each of their rows, since cuBLAS
    gives a product so long and narrow to few multiprocessors.
    """
    return torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).sum(0)
