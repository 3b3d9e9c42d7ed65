"""How many bytes each of several devices sends to the others in a training step.

What moves is told in docs/scale.md ("Replicated or sharded"); :mod:`planearly.parallel`,
:mod:`planearly.sharding` and :mod:`planearly.train.muon` move it. Collective calls are taken to
move the least they can, as a ring does: of S bytes, N devices that sum them send 2 S (N - 1) / N
each, and S (N - 1) / N to gather them or to hand out a sum in parts (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

from planearly.model import flops, memory
from planearly.model.memory import Job

_UPDATE, _GRADIENT = 2, 4  # bytes of a number: of what Muon exchanges, and of a gradient
_NARROW = 2  # of a gradient that travels in bfloat16


def sent_bytes(job: Job, passes: int, bf16: bool = False) -> float:
    """Bytes that each device sends in a step; it receives as many.

    Args:
        passes: forward and backward passes of a step on one device.
        bf16: gradients of what is whole on every device travel in bfloat16.
    """
    n, shape = job.processes, job.shape
    if n == 1:
        return 0.0
    muon, other = memory.trained(job)
    size = _NARROW if bf16 else _GRADIENT
    summed, gathered = float(size * (muon + other)), float(_UPDATE * muon)
    if job.sharded and job.projected:
        dense = flops.projected_weights(shape, job.projected)
        bank = job.projected.slices * dense
        summed -= size * bank
        # weights to all, their gradients in parts; Muon's rows for whole matrices, and back
        gathered += 2 * _GRADIENT * job.projected.at_once * dense
        gathered -= (_UPDATE - 2 * _UPDATE / n) * (bank if muon else 0)
    elif job.sharded:
        matrices = memory.block_matrices(shape)
        tables = flops.parameters(shape) - matrices
        narrow = job.bf16 and job.logit_tokens is None  # models of others are gathered in float32
        summed = 0.0
        gathered = passes * ((2 * (2 if narrow else 4) + _GRADIENT) * matrices
                             + (4 + _GRADIENT) * tables) + 2 * _UPDATE * muon / n
    return (2 * summed + gathered) * (n - 1) / n
