"""The loss of a distillation step is the formula; stored answers are the live ones."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly import keys
from planearly.data.dataset import IGNORE
from planearly.data.pack import pack_rows
from planearly.errors import UserError
from planearly.model import parts
from planearly.model.transformer import Shape, Transformer
from planearly.train.distill import Distillation, Live, Stored, Taught, divergence, largest, store
from planearly.train.objective import NextToken
from small_trainings import Words

STUDENT = Shape(layers=2, d_model=32, heads=2, d_ff=48, vocab_size=50, context=16)
TEACHER = Shape(layers=3, d_model=48, heads=2, d_ff=64, vocab_size=50, context=16)
CPU = torch.device("cpu")


def live(temperature: float = 1.0, dtype: torch.dtype = torch.float64) -> Live:
    model = Transformer(TEACHER, seed=7).to(dtype).requires_grad_(False)
    return Live(lambda inputs: 5 * model(inputs), 50, temperature, 123.0, TEACHER)


def by_hand(student, teacher, inputs, targets, a, b, heat) -> torch.Tensor:
    """The formula of the module, one position at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(inputs)):
        z, t = student(inputs)[row], teacher.forward(inputs)[row]
        for i in range(inputs.shape[1]):
            if targets[row, i] == IGNORE:
                continue
            q1 = torch.exp(z[i]) / torch.exp(z[i]).sum()
            q = torch.exp(z[i] / heat) / torch.exp(z[i] / heat).sum()
            p = torch.exp(t[i] / heat) / torch.exp(t[i] / heat).sum()
            total = total - a * torch.log(q1[targets[row, i]])
            total = total + b * heat**2 * (p * torch.log(p / q)).sum()
    return total


@pytest.mark.parametrize(("a", "b", "heat"), [(0.5, 0.5, 1.0), (0.3, 0.9, 2.5), (0.0, 1.0, 1.0)])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradient_equal_the_formula(a, b, heat, tied, monkeypatch):
    monkeypatch.setattr(parts, "LOGITS", 2 * 16 * 50)  # two rows at a time, the last alone
    shape = Shape(2, 32, 2, 48, 50, 16, tie_embeddings=tied)
    student = Transformer(shape, seed=1).double()
    teacher = live(heat)
    batch = Words().batch(0, 5)
    goal = Distillation(teacher, keys.Distill(a, b, heat))
    expected = by_hand(student, teacher, batch.inputs, batch.targets, a, b, heat)
    slopes = torch.autograd.grad(expected, list(student.parameters()))
    found = goal(student, batch.inputs, batch.targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    (2 * found).backward()
    for parameter, slope in zip(student.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * slope, rtol=1e-6, atol=1e-9)


def test_without_a_teacher_it_is_next_token_and_with_itself_nothing():
    student = Transformer(STUDENT, seed=1).double()
    batch = Words().batch(0, 4)
    data = Distillation(live(), keys.Distill(1.0, 0.0))(student, batch.inputs, batch.targets)
    assert data.item() == pytest.approx(student.loss(batch.inputs, batch.targets).item(), rel=1e-6)
    itself = Live(student, 50, 1.0, 0.0)
    same = Distillation(itself, keys.Distill(0.0, 1.0))(student, batch.inputs, batch.targets)
    assert same.item() == pytest.approx(0.0, abs=1e-9)


def test_padding_never_counts():
    student = Transformer(STUDENT, seed=1).double()
    batch = Words().batch(0, 4)
    batch.targets[2] = IGNORE
    goal = Distillation(live(), keys.Distill())
    full = goal(student, batch.inputs, batch.targets)
    keep = np.array([0, 1, 3])
    part = batch.take(keep)
    assert full.item() == pytest.approx(goal(student, part.inputs, part.targets).item(), rel=1e-9)
    none = torch.full_like(batch.targets, IGNORE)
    assert goal(student, batch.inputs, none).item() == 0.0


class Tokens:
    """A dataset of windows with known lengths, as much of one as rows need."""

    context = 16

    def __init__(self, lengths) -> None:
        rng = np.random.default_rng(0)
        self.spans = [rng.integers(0, 50, n + 1) for n in lengths]

    def rows(self, row_windows):
        inputs = np.zeros((len(row_windows), 16), np.int64)
        targets = np.full((len(row_windows), 16), IGNORE, np.int64)
        for r, windows in enumerate(row_windows):
            at = 0
            for w in windows:
                n = len(self.spans[w]) - 1
                inputs[r, at:at + n], targets[r, at:at + n] = self.spans[w][:-1], self.spans[w][1:]
                at += n
        return inputs, targets


def stored(folder, k, temperature=1.0, lengths=(16, 7, 9, 16, 3, 12, 16)):
    dataset = Tokens(lengths)
    rows = pack_rows(np.array(lengths), np.zeros(len(lengths), int), 1, 16, seed=0)
    stream = SimpleNamespace(dataset=dataset, rows=rows, context=16)
    teacher = live(temperature, torch.float32)
    store(teacher, stream, k, folder, contextlib.nullcontext, CPU)
    inputs, targets = dataset.rows([rows.row(r) for r in range(len(rows))])
    return teacher, torch.from_numpy(inputs), torch.from_numpy(targets)


@pytest.mark.parametrize("heat", [1.0, 2.0])
def test_stored_answers_equal_live_ones_when_k_is_the_vocabulary(tmp_path, heat):
    teacher, inputs, targets = stored(tmp_path, 50, heat)
    student = Transformer(STUDENT, seed=1)
    order = torch.tensor([3, 0, 2])  # rows come in any order and any batch
    settings = keys.Distill(0.5, 0.5, heat)
    gradients = []
    for each in (teacher, Stored(tmp_path)):
        goal = Distillation(each, settings)
        value = goal(student, inputs[order], targets[order])
        gradients.append((value, *torch.autograd.grad(value, list(student.parameters()))))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_stored_answers_cost_the_teacher_once(tmp_path):
    _, inputs, _ = stored(tmp_path, 4)
    goal = Distillation(Stored(tmp_path), keys.Distill())
    assert goal.flops_per_token == 0
    assert goal.flops_before == 123.0 * inputs.numel()
    beside = Distillation(live(), keys.Distill())
    assert beside.flops_per_token == 123.0
    assert goal.teacher_width == beside.teacher_width == TEACHER.d_model
    assert goal.teacher_shape is None  # it is not run beside the student
    plain = NextToken()
    assert plain.flops_per_token == plain.flops_before == plain.seconds_before == 0


@pytest.mark.parametrize("text", ["{", "[1]", "7", "{}"])
def test_a_damaged_note_of_stored_answers_is_one_sentence(tmp_path, text):
    stored(tmp_path, 4)
    (tmp_path / "stored.json").write_text(text)
    with pytest.raises(UserError, match=r"stored\.json is (damaged|not valid JSON)"):
        Stored(tmp_path)


def test_an_unknown_row_is_not_answered_with_another(tmp_path):
    _, inputs, _ = stored(tmp_path, 4)
    for shift in range(1, 20):  # hashes before, between and beyond those that are stored
        with pytest.raises(KeyError):
            Stored(tmp_path)((inputs[:1] + shift) % 50)


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
def test_tokens_of_large_vocabularies_are_stored_whole(tmp_path, vocab_size):
    last = torch.zeros(vocab_size)
    last[-1] = 9.0
    teacher = Live(lambda inputs: last.expand(*inputs.shape, -1), vocab_size, 1.0, 123.0)
    rows = pack_rows(np.array([16, 16]), np.zeros(2, int), 1, 16, seed=0)
    dataset = Tokens([16, 16])
    store(teacher, SimpleNamespace(dataset=dataset, rows=rows, context=16), 1, tmp_path,
          contextlib.nullcontext, CPU)
    inputs = torch.from_numpy(dataset.rows([rows.row(0)])[0])
    assert (Stored(tmp_path)(inputs).ids == vocab_size - 1).all()


def test_a_finished_store_is_not_made_again(tmp_path):
    stored(tmp_path, 4)
    before = (tmp_path / "ids.npy").stat().st_mtime_ns
    stored(tmp_path, 4)
    assert (tmp_path / "ids.npy").stat().st_mtime_ns == before


@examples(100)
@given(seed=st.integers(0, 1000), k=st.integers(1, 8))
def test_top_k_merges_the_others_and_never_exceeds_the_live_divergence(seed, k):
    generator = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(5, 8, generator=generator, dtype=torch.float64)).log_softmax(-1)
    z = 3 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    whole = divergence(Taught(p), z)
    top = largest(Taught(p), k)
    merged = divergence(top, z)
    assert (merged <= whole + 1e-12).all()
    assert (merged >= -1e-12).all()
    q = z.softmax(-1)
    for i in range(5):
        first = top.ids[i]
        others = [j for j in range(8) if j not in first.tolist()]
        hand = sum((p[i, j].exp() * (p[i, j] - q[i, j].log())).item() for j in first)
        if others:
            mass, mine = p[i, others].exp().sum(), q[i, others].sum()
            hand += (mass * (mass.log() - mine.log())).item()
        assert merged[i].item() == pytest.approx(hand, abs=1e-9)


def test_extra_rows_of_a_teachers_output_matrix_are_left_out():
    padded = Live(lambda inputs: torch.randn(*inputs.shape, 64), 50, 1.0, 0.0)
    taught = padded(torch.zeros(2, 16, dtype=torch.int64))
    assert taught.log_p.shape == (2, 16, 50)
    torch.testing.assert_close(taught.log_p.exp().sum(-1), torch.ones(2, 16))


def test_under_autocast_gradients_reach_every_parameter():
    student = Transformer(STUDENT, seed=1)
    batch = Words().batch(0, 4)
    goal = Distillation(live(dtype=torch.float32), keys.Distill())
    exact = goal(student, batch.inputs, batch.targets)
    with torch.autocast("cpu", torch.bfloat16):
        value = goal(student, batch.inputs, batch.targets)
    value.backward()
    assert value.item() == pytest.approx(exact.item(), rel=0.01)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
