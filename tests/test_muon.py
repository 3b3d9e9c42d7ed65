"""Muon for matrices and stacks of them."""

import pytest
import torch

from planearly.train.muon import Muon, orthogonalise


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
