"""Processes and devices: with :mod:`planearly.sharding` alone with torch.distributed.

Started under ``torchrun`` a run finds its place in the environment; alone, every function here is
the identity. A model that fits stays whole on every process and gradients are summed once per step
(data parallelism, :mod:`planearly.train.reducer`); losses are sums and token counts are global, so
the number of processes changes nothing but the order of additions.

Hosts talk to each other over gloo, GPUs over NCCL: processes meet and add up numbers of the host
without waiting for their devices.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from planearly import files, processes
from planearly.errors import UserError

BUCKET = 1 << 25
"""Elements that are on their way to other processes at once (128 MB of float32)."""
_LETTING_GO = 0.5
"""Seconds that gloo's threads have at the end, many times what they took on a busy machine."""
_PATIENCE = timedelta(days=7)
"""How long a process waits for the others: most stages run on the first one alone, for hours.
``torchrun`` ends all of them when one fails."""


def start() -> None:
    """Join the process group that ``torchrun`` describes, if there is one and it is not joined."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        processes.follow(os.getppid())  # torchrun, once killed, ends none
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    # its threads, left to the interpreter's end, now and then abort a process that is done
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        # gloo's threads let go of a call's tensors a little after it is done, and need the
        # interpreter for that: where it has ended meanwhile, the process is aborted
        time.sleep(_LETTING_GO)
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every process has come here; their devices may still be at work."""
    sum_scalars(0.0)


def device() -> torch.device:
    """Where this process computes: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def share(start: int, stop: int) -> tuple[int, int]:
    """This process's part of the places [start, stop): contiguous, sizes differ by at most one."""
    size, own = stop - start, rank()
    return start + size * own // world(), start + size * (own + 1) // world()


def deal(n: int, first: int) -> slice:
    """This process's part of n things, assigned round-robin from process ``first`` (modulo) on."""
    return slice((rank() - first) % world(), n, world())


def gather(own: Tensor, n: int, first: int) -> Tensor:
    """All n things [n, ...], in order, of which each process has what :func:`deal` gave it."""
    if not dist.is_initialized():
        return own
    padded = own.new_zeros(math.ceil(n / world()), *own.shape[1:])
    padded[:len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(world())]
    # as bytes: gloo has not always known bfloat16
    dist.all_gather([part.view(torch.uint8) for part in parts], padded.view(torch.uint8))
    in_turn = [parts[(first + turn) % world()] for turn in range(world())]
    return torch.stack(in_turn, dim=1).flatten(0, 1)[:n]


def sum_scalars(*values: float) -> list[float]:
    """Sum of each value over the processes, in float64, from host to host."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
    dist.all_reduce(tensor)
    return tensor.tolist()


def summing(tensor: Tensor) -> Callable[[], Any]:
    """Begin to sum a tensor over the processes, in place; what is returned waits for the sum."""
    return dist.all_reduce(tensor, async_op=True).wait


def first_process(*values: float) -> list[float]:
    """The first process's values, on all of them."""
    return sum_scalars(*(float(value) if rank() == 0 else 0.0 for value in values))


def hosts() -> int:
    """Machines that the processes run on, as ``torchrun`` tells it."""
    return max(world() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def on_device() -> int:
    """How many of the processes compute on this one's device: one on a GPU, all of a machine on its
    processor."""
    return 1 if device().type == "cuda" else world() // hosts()


def check_rows(rows: int) -> None:
    """Refuse a batch of fewer rows than processes."""
    if rows < world():
        raise UserError(
            f"a step of {rows} rows cannot be divided among {world()} processes: "
            "raise 'pretrain.batch_tokens' (and 'finetune.batch_tokens') or start fewer"
        )


# Devices ----------------------------------------------------------------------------------------

@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on the CPU in one thread: how sums are divided among threads changes their rounding,
    and results are to be the same in one process and in many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; the host waits for no work queued there."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@functools.cache
def bf16_is_fast(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: on GPUs and processors that
    have units for them (AMX), and else where a measured product says so.

    AVX-512's dot products of bfloat16 say nothing by themselves: on Intel's server cores they have
    half the throughput of float32's multiply-add and come out slower, on others twice.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags or ("avx512_bf16" in flags and _kept_bf16_gain(flags) > 1.2)


def _kept_bf16_gain(processor: str) -> float:
    """:func:`_bf16_gain` of this kind of processor, measured once and kept in the cache folder: on
    a busy machine two processes would measure differently and end with other weights.

    Args:
        processor: ``/proc/cpuinfo``.
    """
    kind = sorted({line for line in processor.splitlines()
                   if line.startswith(("model name", "flags"))})
    file = files.cache_folder() / f"bf16-{files.digest(kind)[:8]}.json"
    if not file.exists():
        gain, own = _bf16_gain(), file.with_suffix(f".{os.getpid()}")
        try:
            files.write_json(own, {"gain": gain})
            with contextlib.suppress(FileExistsError):  # another process was first: its is taken
                os.link(own, file)
        except (UserError, OSError):
            return gain
        finally:
            with contextlib.suppress(OSError):
                own.unlink()
    try:
        return float(files.read_json(file)["gain"])
    except (UserError, KeyError, TypeError, ValueError):
        return _bf16_gain()


def _bf16_gain(size: int = 512, repeats: int = 7) -> float:
    """Time of a float32 matrix product on this processor over a bfloat16 one's (some 30 ms)."""
    best = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for _ in range(repeats):  # in turns, and the best of each: other work passes
        for kind in best:
            matrix = torch.ones(size, size, dtype=kind)
            began = time.perf_counter()
            _ = matrix @ matrix
            best[kind] = min(best[kind], time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]
