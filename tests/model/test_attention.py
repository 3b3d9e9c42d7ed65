"""Attention written out, and the output in chunks, against torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly.model import attention, loss


def both(first, second, *tensors: torch.Tensor):
    """Values and gradients of two functions of the same tensors."""
    found = []
    for function in (first, second):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        value = function(*leaves)
        weight = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
        found.append([value.detach(), *torch.autograd.grad((value * weight).sum(), leaves)])
    return zip(*found, strict=True)


@pytest.mark.parametrize(("heads", "kv_heads", "time"), [(4, 4, 64), (6, 2, 33), (4, 1, 1)])
def test_attention_written_out_is_the_librarys(heads, kv_heads, time):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, time, 16) for n in (heads, kv_heads, kv_heads))

    def librarys(q, k, v):
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    for function in (attention.written_out, attention.causal):
        for own, other in both(function, librarys, q, k, v):
            torch.testing.assert_close(own, other, rtol=2e-5, atol=2e-6)


def test_attention_is_written_out_only_where_it_pays(monkeypatch):
    called = []
    monkeypatch.setattr(attention, "written_out", lambda q, k, v: called.append(q.shape) or q)
    for dtype, time in ((torch.bfloat16, 8), (torch.float32, 8),
                        (torch.bfloat16, attention.SHORT + 1)):
        attention.causal(*(torch.randn(1, 2, time, 4).to(dtype) for _ in range(3)))
    assert called == [torch.Size([1, 2, 8, 4])]


@pytest.mark.parametrize("vocab_size", [257, 8192, 151_936, 1 << 25])
@pytest.mark.parametrize(("device", "logits"), [("cpu", 1 << 23), ("cuda", 1 << 28),
                                                ("mps", 1 << 23)])
def test_a_chunk_is_as_large_as_its_memory_allows(vocab_size, device, logits):
    positions = loss.chunk_tokens(vocab_size, device)
    assert positions == 1 or positions * vocab_size <= logits
    assert (positions + 1) * vocab_size > logits


@examples(100)
@given(st.integers(0, 3000), st.integers(1, 400))
def test_parts_are_few_even_and_cover_all(n, most):
    parts = loss.even_parts(n, most)
    assert [i for part in parts for i in range(n)[part]] == list(range(n))
    sizes = {part.stop - part.start for part in parts} or {0}
    assert len(parts) == math.ceil(n / most) and max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("most", [7, 1000])
def test_chunks_of_the_output_are_torchs_cross_entropy(monkeypatch, most):
    torch.manual_seed(0)
    monkeypatch.setitem(loss._LOGITS, "cpu", most * 50)
    hidden, weight = torch.randn(20, 8), torch.randn(50, 8)
    targets = torch.randint(0, 50, (20,))
    targets[::3] = loss.IGNORE
    for own, other in both(
            lambda h, w: loss.cross_entropy(h, w, targets),
            lambda h, w: F.cross_entropy(h @ w.T, targets, reduction="sum"), hidden, weight):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_chunks_take_only_the_gradients_that_are_wanted(monkeypatch):
    torch.manual_seed(0)
    wanted = []

    def chunk(hidden, weight, targets, slopes):
        wanted.append(slopes)
        return loss.chunk(hidden, weight, targets, slopes)

    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8)
    targets = torch.randint(0, 50, (4,))
    loss.cross_entropy(hidden, weight, targets, chunk).backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        loss.cross_entropy(hidden, weight, targets, chunk)
    assert wanted == [True, False]


def test_chunks_under_autocast_multiply_in_its_type_and_sum_in_float32():
    torch.manual_seed(0)
    hidden = torch.randn(64, 32, requires_grad=True)
    weight = (torch.randn(50, 32) / 6).requires_grad_()
    targets = torch.randint(0, 50, (64,))
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss.cross_entropy(hidden, weight, targets)
    value.backward()
    assert value.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=2e-3)
    for own, other in zip((hidden.grad, weight.grad), expected, strict=True):
        assert (own - other).norm() < 0.01 * other.norm()
