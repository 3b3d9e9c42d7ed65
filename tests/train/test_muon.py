"""Muon for matrices and stacks of them."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from planearly import tensors
from planearly.train import muon
from planearly.train.muon import Muon, orthogonalise
from small_processes import together


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (16, 16)])
def test_singular_values_come_near_one(size):
    torch.manual_seed(0)
    made = orthogonalise(torch.randn(3, *size)).float()
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.3 and values.max() < 1.3


def test_a_stack_is_its_matrices_alone():
    torch.manual_seed(0)
    stack = torch.randn(4, 12, 20)
    together = orthogonalise(stack)
    for one, alone in zip(together, stack, strict=True):
        assert torch.allclose(one.float(), orthogonalise(alone[None])[0].float(), atol=1e-2)


@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_a_matrix_moves_as_under_torchs_muon(size):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(size)) for _ in range(2))
    mine = Muon([ours], lr=0.01, weight_decay=0.1)
    torchs = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        gradient = torch.randn(size, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
    moved = (theirs - 1).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_a_bank_of_slices_is_moved_slice_by_slice():
    torch.manual_seed(0)
    bank = torch.nn.Parameter(torch.randn(3, 8, 12))
    alone = torch.nn.Parameter(bank.detach()[1].clone())
    gradient = torch.randn(3, 8, 12)
    bank.grad, alone.grad = gradient, gradient[1].clone()
    Muon([bank], lr=0.01).step()
    Muon([alone], lr=0.01).step()
    assert torch.allclose(bank[1], alone, atol=1e-4)


def test_wide_and_tall_matrices_of_one_size_move_together_as_each_alone():
    torch.manual_seed(0)
    sizes = [(8, 12), (12, 8), (3, 12, 8), (8, 12), (8, 8)]
    together = [torch.nn.Parameter(torch.randn(*size)) for size in sizes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    everyone, each = Muon(together, lr=0.01), [Muon([p], lr=0.01) for p in alone]
    for _ in range(3):
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        everyone.step()
        for own in each:
            own.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def _one_of(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meet{processes}", rank=rank, world_size=processes)
    # 6 wide matrices, 5 tall and 1 square: the processes' shares are not whole
    sizes = [(24, 40), (3, 24, 40), (2, 24, 40), (5, 40, 24), (16, 16)]
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(*size, generator=draw)) for size in sizes]
    optimizer = Muon([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.01)
    with mock.patch.object(muon, "orthogonalise", wraps=orthogonalise) as work:
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            optimizer.step()
    count = sum(len(call.args[0]) for call in work.call_args_list)
    state = {str(n): parameter.detach() for n, parameter in enumerate(parameters)}
    for n, parameter in enumerate(parameters):
        state[f"{n}/momentum"] = optimizer.state[parameter]["momentum_buffer"]
    tensors.save_tensors(Path(folder) / f"{rank}-of-{processes}", state, {"count": count})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_divide_the_matrices_and_end_as_one_alone(tmp_path):
    _one_of(0, 1, str(tmp_path))
    together(3, _one_of, 3, str(tmp_path))
    alone, note = tensors.load_tensors(tmp_path / "0-of-1")
    assert note["count"] == 3 * 12
    for rank in range(3):
        divided, note = tensors.load_tensors(tmp_path / f"{rank}-of-3")
        assert note["count"] == 3 * 4
        for name, tensor in alone.items():
            assert torch.equal(tensor, divided[name]), name


def test_no_matrices_are_none():
    assert orthogonalise(torch.empty(0, 24, 40)).shape == (0, 24, 40)
