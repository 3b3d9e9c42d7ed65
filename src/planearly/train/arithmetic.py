"""By which arithmetic a training computes: precision, rows of a forward pass, compiled code or not.

None of it changes what is trained, all of it changes the rounding. So it is settled once, by the
first process, from what is measured or found here, and kept with the training: a run that was
killed goes on by the same arithmetic and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from planearly import keys, parallel, processes
from planearly.errors import UserError
from planearly.files import cache_folder, digest, read_json, read_object, write_json
from planearly.model import loss, memory, parts
from planearly.model.outside import AnyModel, AnyShape, alike
from planearly.model.projected import Projected
from planearly.model.transformer import Block, Kernels, Transformer
from planearly.parallel import bf16_is_fast
from planearly.progress import say
from planearly.units import duration

F = TypeVar("F")
KEPT = "arithmetic.json"
EAGER_STEPS = 2
"""Steps before it is decided whether to compile; the last of them is the measured one."""
_COLD = {"cpu": 20.0, "cuda": 10.0}
"""Seconds that compiling takes where nothing is known yet: on the two cores and on the H200 of
docs/benchmarks.md."""
_GAIN = {"cpu": (1.2, 1.3), "cuda": (1.3, 1.5)}
"""Uncompiled over compiled time of a step in float32 and in bfloat16, where nothing is known yet;
on GPUs bfloat16 was measured, float32 was not."""
_MARGIN = 1.2
"""What compiling saves must be more than it costs by this factor."""


@dataclass
class Arithmetic:
    """How a training computes."""

    bf16: bool
    """Matrix products in bfloat16, under autocast."""
    rows: int
    """Rows of a forward pass."""
    decided: bool = False
    """Whether it is settled if it is compiled."""
    compiled_from: int | None = None
    """Step from which it runs compiled; None: it never does."""
    fast_bf16: bool | None = None
    """Matrix products of the optimiser and of validation in bfloat16; None: not decided yet."""
    bf16_gradients: bool = False
    """Gradients travel between processes in bfloat16."""

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    def validating(self, device: torch.device, cached: bool = True) -> torch.autocast:
        """The same for validation.

        Args:
            cached: whether to keep the weights in bfloat16 beside, which saves time.
        """
        return torch.autocast(device.type, torch.bfloat16, enabled=bool(self.fast_bf16),
                              cache_enabled=cached)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def settle(settings: keys.Train, context: int, device: torch.device, folder: Path,
           kept: dict[str, Any] | None, job: memory.Job | None = None,
           narrow: Callable[[memory.Job, int], bool] | None = None) -> Arithmetic:
    """What an interrupted training in ``folder`` computed by, else what suits the device.

    Args:
        kept: of its checkpoint.
        job: for the memory that a step needs; None: unknown, and taken as small.
        narrow: as of :func:`planearly.train.loop.train`.
    """
    noted = None
    with contextlib.suppress(UserError):  # there is none, or it is damaged
        noted = read_object(folder / KEPT, "bf16", "rows")
    kept = noted if kept is None else kept
    made = Arithmetic(**kept) if kept else Arithmetic(
        use_bf16(settings.precision, device), microbatch_rows(settings, context, device, job))
    if kept:
        # lowered after it was killed for want of memory, or begun on a device of another kind
        made.rows = min(made.rows, microbatch_rows(settings, context, device))
        if made.compiled_from is not None and not can_compile():
            made.compiled_from = None
    if noted:  # by a process that ran out of memory while others waited
        made.rows = min(made.rows, noted["rows"])
    if kept is None and settings.compile != "auto":
        made.decided = True
        made.compiled_from = 0 if settings.compile == "yes" and can_compile() else None
    if made.fast_bf16 is None:
        made.fast_bf16 = bf16_is_fast(device)
    if kept is None:
        made.bf16_gradients = settings.gradients == "bf16" or bool(
            settings.gradients == "auto" and device.type == "cuda" and parallel.hosts() > 1
            and job and narrow and narrow(job, settings.step_tokens // parallel.world()))
    bf16, rows, decided, compiled_from, fast, gradients = parallel.first_process(
        made.bf16, made.rows, made.decided,
        -1 if made.compiled_from is None else made.compiled_from, made.fast_bf16,
        made.bf16_gradients)
    made = Arithmetic(bool(bf16), int(rows), bool(decided),
                      None if compiled_from < 0 else int(compiled_from), bool(fast),
                      bool(gradients))
    keep(made, folder)
    return made


def keep(arithmetic: Arithmetic, folder: Path) -> None:
    if parallel.rank() == 0:
        write_json(folder / KEPT, arithmetic.to_dict())


# Precision, rows --------------------------------------------------------------------------------

def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether a recipe's ``precision`` means bfloat16 on this device (docs/decisions.md, "bfloat16
    where it is fast")."""
    return precision == "bf16" or (precision == "auto" and bf16_is_fast(device))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a forward pass runs: matrix products in bfloat16 where asked or fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device))


def microbatch_rows(settings: keys.Train, context: int, device: torch.device,
                    job: memory.Job | None = None) -> int:
    """Rows of a forward pass: as the recipe says, else what suits the device's speed, as far as its
    free memory holds it."""
    tokens = settings.microbatch_tokens
    if tokens is None:
        tokens = memory.MOST_TOKENS[device.type]
        if job is not None and device.type == "cuda":
            job = dataclasses.replace(job, bf16=use_bf16(settings.precision, device))
            tokens = memory.fitting_microbatch(
                _available(device), job, settings.step_tokens // parallel.world(), tokens)
    return max(tokens // context, 1)


def job_of(model: nn.Module, body: AnyModel, preset: str, teacher: AnyShape | None,
           device: torch.device, averaged: bool = False) -> memory.Job:
    """What the memory formula asks of a training.

    Args:
        model: holds the trained parameters; body: the dense model that runs.
        teacher: the shape of the model that answers beside it; None: it has none.
        averaged: whether the weights' averages are kept beside them.
    """
    adapters = [p for name, p in body.named_parameters() if "lora_A" in name]
    shape = alike(body.shape)
    return memory.Job(
        shape, preset, projected=model.settings if isinstance(model, Projected) else None,
        adapter_rank=len(adapters[0]) if adapters else None,
        teacher=alike(teacher) if teacher else None,
        # the others' logits are made by whole rows
        logit_tokens=None if isinstance(body, Transformer)
        else max(parts.LOGITS // shape.vocab_size, shape.context),
        device="cuda" if device.type == "cuda" else "cpu", processes=parallel.world(),
        averaged=averaged)


def divides(settings: keys.Train, job: memory.Job, device: torch.device, undivided: str | None,
            name: str) -> bool:
    """Whether the processes divide what a training keeps: as the recipe says, else where they must
    and can.

    Args:
        undivided: what cannot be divided; None: all can.

    Raises:
        UserError: the recipe asks for what cannot be.
    """
    if settings.shard == "no":
        return False
    if settings.shard == "yes":
        if undivided:
            raise UserError(f"{name}: {undivided} is not divided among processes: "
                            f"leave recipe key '{settings.section_name}.shard' at 'auto'")
        return True
    job = dataclasses.replace(job, bf16=use_bf16(settings.precision, device))
    must = not undivided and memory.regime(_available(device), job).sharded
    return parallel.sum_scalars(float(must))[0] > 0


def _available(device: torch.device) -> float:
    """Bytes that this process has or can have: as much as each of those that share the device
    (:func:`planearly.processes.sharing`), of a GPU no more than other programs have left; of a
    machine's memory also as much as every other process of ``torchrun`` there."""
    sharing = processes.sharing()
    if device.type == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / sharing
    free, total = torch.cuda.mem_get_info(device)
    return min(float(free + torch.cuda.memory_reserved(device)), total / sharing)


def tune_allocator() -> None:
    """Keep glibc from returning large buffers to the kernel after every operation.

    On CPU the activations of each step are otherwise mapped and zeroed anew (docs/experiments.md
    has what that costs; benchmarks/train_throughput.py gives the peers the same settings).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# Compiling --------------------------------------------------------------------------------------

def can_compile() -> bool:
    """Whether torch.compile has what it needs on this machine (a C++ compiler on CPU)."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):
        return False
    return True


_shared: dict[str, Kernels] = {}
"""Compiled kernels of this process's trainings, by what they are compiled for; those longest
unused first."""
_MOST_SHARED = 16


def compile_kernels(body: AnyModel, purpose: str) -> None:
    """Compile a model's blocks and its output, each once for all layers and chunks.

    A model of others runs as its library has it.

    Args:
        purpose: trainings of one purpose and shape share kernels, for as long as the process
            lives: the hundreds of small trainings of a study compile a few times only.

    Inductor's files go to the user's cache folder, so that the next training of the same shape,
    and the next run, find them (``TORCHINDUCTOR_CACHE_DIR`` says otherwise).
    """
    if not isinstance(body, Transformer):
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    key = _key(body, purpose)
    kernels = _shared.pop(key) if key in _shared else Kernels(
        torch.compile(own_code(Block.compute)), torch.compile(own_code(loss.chunk)))
    body.kernels = _shared[key] = kernels
    if len(_shared) > _MOST_SHARED:
        del _shared[next(iter(_shared))]


def _key(body: Transformer, purpose: str) -> str:
    return digest([purpose, body.shape.to_dict()])


def own_code(function: F) -> F:
    """A copy with a code object of its own.

    Dynamo keeps compiled graphs, and counts them against its limit of eight, by code object:
    trainings that shared one would run uncompiled after the first few.
    """
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(function.__code__.replace(), function.__globals__,
                              function.__name__, function.__defaults__, function.__closure__)
    return copy  # type: ignore[return-value]


@contextlib.contextmanager
def uncompiled(body: AnyModel) -> Iterator[None]:
    """Run a model by the plain kernels: for batches of ever other shapes."""
    if not isinstance(body, Transformer):
        yield
        return
    kernels, body.kernels = body.kernels, Kernels()
    try:
        yield
    finally:
        body.kernels = kernels


def release(body: AnyModel) -> None:
    """Back to the plain kernels, after a training."""
    if isinstance(body, Transformer):
        body.kernels = Kernels()


class Compiler:
    """Compiles a training when it pays, as its first steps tell.

    What compiling saves is estimated from the duration of an uncompiled step and the steps that are
    left; what it costs, and how much faster steps become, from the last training of the same kind
    on this machine, of which the user's cache folder keeps a note.
    """

    def __init__(self, body: AnyModel, arithmetic: Arithmetic, folder: Path, name: str,
                 steps: int, device: torch.device, kind: str) -> None:
        """
        Args:
            kind: what else beside model and device tells graphs apart.
        """
        self.body, self.arithmetic, self.folder, self.name = body, arithmetic, folder, name
        self.steps, self.device = steps, device
        self._purpose = digest([torch.__version__, device.type, body.shape.to_dict(),
                                arithmetic.bf16, arithmetic.rows, kind])[:16]
        self._note = cache_folder() / "compiling" / f"{self._purpose}.json"
        self._eager: float | None = None
        self._compiled: list[float] = []
        self._began: int | None = None

    def before(self, step: int) -> bool:
        """To be called before each step; True where this one compiles first."""
        wanted = self.arithmetic.compiled_from
        if self._began is not None or wanted is None or step < wanted:
            return False
        compile_kernels(self.body, self._purpose)
        self._began = step
        return True

    def due(self, done: int) -> bool:
        """Whether the duration of step ``done`` (the first is 1) is needed: device and all."""
        if self._began is not None:
            return len(self._compiled) < 3
        return not self.arithmetic.decided and done >= EAGER_STEPS

    def after(self, done: int, seconds: float) -> None:
        """Step ``done`` took so long; decides, and notes what compiling came to."""
        if self._began is not None and len(self._compiled) < 3:
            self._compiled.append(seconds)
            if len(self._compiled) == 3:
                self._learn()
        elif not self.arithmetic.decided:
            self._eager = seconds
            pays = parallel.first_process(float(self._pays(done, seconds)))[0] > 0
            self.arithmetic.decided = True
            self.arithmetic.compiled_from = done if pays else None
            keep(self.arithmetic, self.folder)

    def _pays(self, done: int, seconds: float) -> bool:
        if not isinstance(self.body, Transformer):
            return False
        cost, gain = self.expected()
        saved = (self.steps - done) * seconds * (1 - 1 / gain)
        if saved <= _MARGIN * cost:
            return False
        if not can_compile():
            say("torch.compile finds no C++ compiler here: training runs uncompiled, more slowly")
            return False
        if cost:
            say(f"{self.name}: compiling, which takes about {duration(cost)} and saves about "
                f"{duration(saved)}")
        return True

    def expected(self) -> tuple[float, float]:
        """Seconds that compiling takes, and uncompiled over compiled time of a step."""
        cost, gain = self._noted()
        shared = isinstance(self.body, Transformer) and _key(self.body, self._purpose) in _shared
        return (0.0 if shared else cost), gain

    def _noted(self) -> tuple[float, float]:
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            note = read_json(self._note)
            return float(note["seconds"]), float(note["gain"])
        return _COLD[self.device.type], _GAIN[self.device.type][self.arithmetic.bf16]

    def _learn(self) -> None:
        first, *later = self._compiled
        usual = min(later)
        if self._eager is None or parallel.rank() > 0 or first < 2 * usual:
            return  # the last: nothing had to be compiled
        with contextlib.suppress(UserError, OSError):  # a cache that cannot be written is no harm
            write_json(self._note, {"seconds": max(first - usual, 0.0),
                                    "gain": self._eager / usual})
