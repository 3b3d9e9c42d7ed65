"""Projected networks: exact against autograd, exact on resume, one process or two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from examples import examples
from planearly import config, keys, sharding, tensors
from planearly.data.dataset import IGNORE
from planearly.data.streams import Batch
from planearly.errors import UserError
from planearly.model import flops, grouped
from planearly.model.mixture import Mixture
from planearly.model.projected import Projected, by_group
from planearly.model.transformer import Shape, Transformer
from planearly.train import arithmetic, loop
from planearly.train.trainable import Dense
from small_banks import GATED, HISTOGRAMS, PLAIN, SETTINGS, TRAIN, Made, nll
from small_processes import together


def naive(model: Projected, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by autograd through the paper's sum, row by row."""
    twin = Transformer(model.shape).to(model.experts.dtype)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    loss = torch.zeros((), dtype=model.experts.dtype)
    for row, group in enumerate(batch.groups):
        expert = parameters["experts"][group] if model.blends is None else \
            model.blends[group].to(parameters["experts"]) @ parameters["experts"]
        weights = {n.removeprefix("body."): p for n, p in parameters.items()
                   if n.startswith("body.")}
        for name in model.names:
            place = f"banks.{name.removesuffix('.weight').replace('.', '_')}"
            weights[name] = torch.einsum(
                "q,qr,r...->...", expert, parameters[f"{place}.mixing"],
                parameters[f"{place}.slices"],
            )
        logits = torch.func.functional_call(twin, weights, (batch.inputs[row : row + 1],))
        loss = loss + F.cross_entropy(logits[0], batch.targets[row], ignore_index=IGNORE,
                                      reduction="sum")
    return loss, dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())),
                          strict=True))


def deferred(model: Projected, batch: Batch, rows: int) -> float:
    """The same by the deferred projection, into ``grad``."""
    total = 0.0
    model.begin(batch.groups)
    for indices in model.microbatches(batch.groups, rows):
        part = batch.take(indices)
        model.select(part.groups)
        loss = nll(model.body, part.inputs, part.targets)
        loss.backward()
        total += loss.item()
    model.end()
    return total


def test_both_grouped_products_are_those_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([0, 0, 1, 3, 3, 3])  # nothing of group 2
    x, y = (torch.randn(6, 5, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    weight = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)

    def run(product: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        result = product(*leaves)
        return [result.detach(), *torch.autograd.grad(result, leaves, y)]

    asked = run(lambda x, w: torch.einsum("rti,roi->rto", x, w[groups]))
    for product in (grouped.by_row, grouped.by_group):
        found = run(lambda x, w, product=product: product(x, w, groups))
        for ours, exact in zip(found, asked, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize(("shape", "changes"), [
    (GATED, {}), (PLAIN, {}), (GATED, {"matrices": ["up"], "layers": [1]}), (GATED, {"rank": 7}),
], ids=["gated", "plain", "one-matrix", "rank-over-embedding"])
def test_gradients_are_autograds(shape: Shape, changes: dict[str, object], rows: int) -> None:
    settings = keys.Projected(**{**SETTINGS.__dict__, **changes})
    model = Projected(shape, settings, seed=1).double()
    batch = Made(4).batch(0, 9)  # one expert has no rows
    loss, expected = naive(model, batch)
    assert deferred(model, batch, rows) == pytest.approx(loss.item(), rel=1e-13)
    squares = 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-12, (name, error)
        squares += expected[name].square().sum().item()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norm.item() == pytest.approx(squares ** 0.5, rel=1e-12)
    assert torch.all(model.experts.grad[4] == 0)  # type: ignore[index]


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("shape", [GATED, PLAIN], ids=["gated", "plain"])
def test_gradients_of_blends_are_autograds(shape: Shape, rows: int) -> None:
    model = Projected(shape, SETTINGS, seed=1).double().train_on(HISTOGRAMS)
    batch = Made(3).batch(0, 9)
    loss, expected = naive(model, batch)
    assert deferred(model, batch, rows) == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)
    model.begin(np.array([2]))  # the blend that trains is the one that is chosen for a domain
    model.bind(0)
    dense = Transformer(shape).double()
    tensors.set_weights(dense, model.materialise(model.blend(HISTOGRAMS[2])), "blend")
    torch.testing.assert_close(model.body(batch.inputs), dense(batch.inputs), rtol=0, atol=1e-6)


def test_blends_of_one_expert_each_are_the_experts(tmp_path: Path) -> None:
    plain, blends = Projected(GATED, SETTINGS), Projected(GATED, SETTINGS).train_on(torch.eye(5))
    for name, model in (("plain", plain), ("blends", blends)):
        loop.train(model, Made(5), 4, TRAIN, tmp_path / name, name=name)
    for (name, one), other in zip(plain.named_parameters(), blends.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("blends", [False, True])
def test_a_divided_bank_is_projected_and_trained_as_a_whole_one(
        blends: bool, one_process: None) -> None:
    model, whole = _made(blends), _made(blends)
    assert not model.divide(False)
    assert all(sharding.divided(bank.slices) for bank in map(model.bank, model.names))
    batch = Made(4).batch(0, 9)
    loss, expected = naive(whole, batch)
    assert deferred(model, batch, 2) == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(sharding.whole(parameter.grad), expected[name],
                                   rtol=1e-10, atol=1e-12)


def test_gradients_add_up_over_steps_without_an_update() -> None:
    model = Projected(GATED, SETTINGS).double()
    batch = Made(5).batch(0, 12)
    first, second = batch.take(np.arange(5)), batch.take(np.arange(5, 12))
    deferred(model, first, 2)
    deferred(model, second, 2)
    _, expected = naive(model, batch)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)


@examples(100)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 9))
def test_microbatches_hold_one_group_each(groups: list[int], rows: int) -> None:
    array = np.array(groups)
    parts = by_group(array, rows)
    assert all(len(p) <= rows and len(set(array[p])) == 1 for p in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(groups)))


@pytest.mark.parametrize("shape", [GATED, PLAIN], ids=["gated", "plain"])
def test_materialised_expert_is_the_networks(shape: Shape) -> None:
    model = Projected(shape, SETTINGS, seed=2)
    inputs = Made(5).batch(0, 6).inputs
    model.begin(np.arange(5))
    for expert in range(5):
        dense = Transformer(shape)
        tensors.set_weights(dense, model.materialise(expert), "materialised")
        model.bind(expert)
        torch.testing.assert_close(model.body(inputs), dense(inputs), rtol=0, atol=1e-5)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])
    blend = model.materialise(model.blend(10 * weights))
    average = sum(w * model.materialise(i)[model.names[0]] for i, w in enumerate(weights))
    torch.testing.assert_close(blend[model.names[0]], average)


def activation_scales(model: Transformer, inputs: Tensor) -> np.ndarray:
    """Root mean square of what each feed-forward adds, and of the stream after each block."""
    seen: list[float] = []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(o.square().mean().sqrt().item()))
             for block in model.blocks for m in (block.ffn, block)]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return np.array(seen)


@pytest.mark.parametrize("rank", [4, 12, 24])
def test_fresh_experts_are_scaled_as_the_plain_model(rank: int) -> None:
    shape = Shape(layers=4, d_model=64, heads=4, d_ff=176, vocab_size=500, context=32)
    inputs = torch.randint(0, 500, (8, 32), generator=torch.Generator().manual_seed(0))
    plain = np.mean([activation_scales(Transformer(shape, s), inputs) for s in range(4)], axis=0)
    model = Projected(shape, keys.Projected(experts=8, rank=rank, embedding=16))
    norms = torch.stack([c.square().sum(1) for c in model.coefficients(model.experts).values()])
    torch.testing.assert_close(norms, torch.ones(len(norms), 8))
    model.begin(np.arange(8))
    scales = []
    for expert in range(8):
        model.bind(expert)
        scales.append(activation_scales(model.body, inputs))
    ratio = np.mean(scales, axis=0) / plain
    print(f"rank {rank}: experts over plain, by layer: {np.round(ratio, 3)}")
    assert np.all(np.abs(ratio - 1) < 0.06)


def test_shared_part_and_deviation() -> None:
    for deviation in (0.0, 0.3, 0.9):
        settings = keys.Projected(experts=400, rank=32, embedding=16, deviation=deviation)
        model = Projected(GATED, settings)
        alpha = next(iter(model.coefficients(model.experts).values())).detach()
        own = (alpha - alpha.mean(0)).square().sum(1).mean()
        assert own.item() == pytest.approx(deviation, abs=0.02)


@pytest.mark.parametrize("shape", [GATED, PLAIN], ids=["gated", "plain"])
def test_from_dense_begins_as_the_checkpoint_and_diverges(shape: Shape, tmp_path: Path) -> None:
    dense = Transformer(shape, seed=5)
    model = Projected.from_dense(tensors.weights(dense), shape, SETTINGS)
    for expert in range(5):
        for name, tensor in model.materialise(expert).items():
            assert torch.equal(tensor, dense.get_parameter(name)), name
    loop.train(model, Made(5), 2, TRAIN, tmp_path, name="pn")
    one, other = model.materialise(0), model.materialise(4)
    assert all((one[n] - other[n]).abs().max() > 1e-5 for n in model.names)


def test_trains_below_one_model_for_all(tmp_path: Path) -> None:
    """Groups that contradict each other need experts."""
    class Shifted(Made):
        def batch(self, start: int, stop: int) -> Batch:
            batch = super().batch(start, stop)
            shift = torch.from_numpy(batch.groups)[:, None] * 7 + 1
            return Batch(batch.inputs, (batch.inputs + shift) % 61, batch.groups)

    settings = keys.Train(**{**TRAIN.__dict__, "optimizer": keys.Optimizer(),
                               "batch_tokens": 16 * 12})
    pn = Projected(GATED, SETTINGS)
    one = Dense(Transformer(GATED))
    stream = Shifted(5)
    ours = loop.train(pn, stream, 60, settings, tmp_path / "pn", name="pn")
    plain = loop.train(one, stream, 60, settings, tmp_path / "plain", name="plain")
    assert ours.loss < 0.8 * plain.loss


@pytest.mark.parametrize("blends", [None, HISTOGRAMS], ids=["clusters", "blends"])
def test_resume_is_exact(blends: Tensor | None, tmp_path: Path,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    whole, broken, resumed = (Projected(GATED, SETTINGS, seed=seed) for seed in (0, 0, 99))
    for model in (whole, broken, resumed) if blends is not None else ():
        model.train_on(HISTOGRAMS)
    loop.train(whole, Made(5), 6, TRAIN, tmp_path / "whole", name="pn")
    with pytest.raises(KeyboardInterrupt):
        loop.train(broken, Made(5, break_at=3 * 8), 6, TRAIN, tmp_path / "broken", name="pn")
    loop.train(resumed, Made(5), 6, TRAIN, tmp_path / "broken", name="pn")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def _made(blends: bool) -> Projected:
    made = Projected(GATED, SETTINGS).double()  # so that the order of additions does not show
    return made.train_on(HISTOGRAMS) if blends else made


def _two(rank: int, folder: str, blends: bool) -> None:
    torch.set_num_threads(1)
    arithmetic.bf16_is_fast = lambda device: False  # measured, processes may differ
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    loop.train(_made(blends), Made(5), 4, TRAIN, Path(folder) / "two", name="pn")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("blends", [False, True])
def test_two_processes_are_one(blends: bool, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "bf16_is_fast", lambda device: False)
    together(2, _two, str(tmp_path), blends)
    alone, start = _made(blends), _made(blends)
    loop.train(alone, Made(5), 4, TRAIN, tmp_path / "one", name="pn")
    both, _ = tensors.load_tensors(tmp_path / "two" / loop.FINAL)
    for (name, one), fresh in zip(alone.named_parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(both[name], one.detach(), rtol=1e-9, atol=1e-11)
        assert not torch.equal(one, fresh), name


@pytest.mark.parametrize(("shape", "settings"), [
    (GATED, SETTINGS), (PLAIN, SETTINGS),
    (GATED, keys.Projected(experts=3, rank=2, embedding=5, matrices=["down"], layers=[0])),
    (GATED, keys.Projected(experts=3, rank=2, embedding=5, matrices=["up", "up"], layers=[1, 1])),
], ids=["gated", "plain", "part", "named twice"])
def test_parameters_are_as_counted(shape: Shape, settings: keys.Projected) -> None:
    model = Projected(shape, settings)
    assert sum(p.numel() for p in model.parameters()) == flops.projected_parameters(shape, settings)


@pytest.mark.parametrize(("recipe", "experts", "paper"), [
    ("pn-756m", 16, 756e6), ("pn-1422m", 32, 1422e6), ("pn-2770m", 64, 2770e6),
])
def test_recipes_come_near_the_papers_sizes(recipe: str, experts: int, paper: float) -> None:
    made = config.load(recipe)
    shape = Shape.of(made.model, made.tokenizer.vocab_size, made.context)
    assert made.projected.experts == experts and experts in made.cluster.k
    assert flops.projected_parameters(shape, made.projected) == pytest.approx(paper, rel=0.016)


@pytest.mark.parametrize(("changes", "words"), [
    ({"matrices": ["sideways"]}, "'sideways'"), ({"layers": [2]}, "layers are 0 to 1"),
    ({"matrices": []}, "nothing to project"),
])
def test_settings_that_cannot_work(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Projected(GATED, keys.Projected(**{**SETTINGS.__dict__, **changes}))


def test_rows_of_no_expert_are_refused() -> None:
    model = Projected(GATED, SETTINGS)
    for wrong in (-1, 5):
        with pytest.raises(UserError, match=f"of cluster {wrong} "):
            model.begin(np.array([0, wrong]))
    with pytest.raises(UserError, match="no expert 5"):
        model.materialise(5)
    for wrong in (-1, 2, 9):
        with pytest.raises(UserError, match=f"no expert {wrong}: this mixture has 0 to 1$"):
            Mixture(GATED, 2).materialise(wrong)


def test_a_checkpoint_that_does_not_fit() -> None:
    state = tensors.weights(Transformer(GATED))
    with pytest.raises(UserError, match=r"has shape \[48, 32\] where this model needs"):
        Projected.from_dense({**state, "blocks.0.ffn.down.weight":
                              state["blocks.0.ffn.up.weight"]}, GATED, SETTINGS)
    with pytest.raises(UserError, match="at least 2"):
        Projected.from_dense(state, GATED, keys.Projected(experts=2, rank=1))
