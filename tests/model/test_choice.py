"""Choosing, blending and tuning experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from examples import examples
from planearly import keys, tensors
from planearly.data.streams import Batch
from planearly.errors import UserError
from planearly.model import choice
from planearly.model.mixture import Mixture
from planearly.model.projected import Projected
from planearly.model.transformer import Shape, Transformer
from planearly.train import arithmetic, vector

SHAPE = Shape(layers=2, d_model=16, heads=2, d_ff=24, vocab_size=31, context=8)
K = 4


def network(seed: int = 0) -> Projected:
    return Projected(SHAPE, keys.Projected(experts=K, rank=3, embedding=5), seed)


def mixture() -> Mixture:
    model = Mixture(SHAPE, K)
    with torch.no_grad():
        for number, one in enumerate(model.models):
            for parameter in one.parameters():
                parameter *= 1 + 0.1 * number
    return model


class Fixed:
    """The same few rows for ever."""

    context = 8

    def batch(self, start: int, stop: int) -> Batch:
        tokens = torch.from_numpy(np.stack([
            np.random.default_rng(place % 4).integers(0, 31, 9) for place in range(start, stop)
        ]))
        return Batch(tokens[:, :-1], tokens[:, 1:], np.zeros(stop - start, np.int64))


def loss(model: Transformer) -> float:
    batch = Fixed().batch(0, 4)
    with torch.no_grad():
        return model.loss(batch.inputs, batch.targets).item() / batch.targets.numel()


def dense(state: dict[str, Tensor]) -> Transformer:
    model = Transformer(SHAPE)
    tensors.set_weights(model, state, "test")
    return model


@pytest.mark.parametrize("make", [network, mixture], ids=["pn", "mix"])
def test_rules(make: object) -> None:
    model = make()  # type: ignore[operator]
    counts = np.array([1.0, 6.0, 2.0, 1.0])
    frequent = choice.choose(model, "most-frequent", counts)
    assert (frequent.expert, frequent.which, frequent.share) == (1, 1, 0.6)
    assert "cluster 1 holds 60% of the domain" in frequent.reason

    lowest = choice.choose(model, "lowest-loss", counts, loss=loss)
    by_hand = [loss(dense(model.materialise(i))) for i in range(K)]
    assert lowest.losses == pytest.approx(by_hand, rel=1e-6)
    assert lowest.expert == int(np.argmin(by_hand))
    first, second = sorted(by_hand)[:2]
    assert f"{first:.4f} nats per token, {second:.4f} of the next" in lowest.reason

    tuned = choice.choose(model, "best-tuned", counts, tune=lambda i, state: [3, 2, 4, 1.5][i])
    assert (tuned.expert, tuned.losses, tuned.share) == (3, [3, 2, 4, 1.5], 0.1)
    assert set(tuned.facts()) == {"rule", "expert", "share", "losses", "reason"}

    even = choice.choose(model, "blend", np.array([0.0, 5, 5, 0]))
    assert "2.0 effective of 4 clusters, 50% in the largest" in even.reason
    blend = choice.choose(model, "blend", counts)
    assert blend.expert is None and blend.share == 1.0
    state = model.materialise(blend.which)
    names = model.names if isinstance(model, Projected) else list(state)
    for name in names:
        average = sum(c / 10 * model.materialise(i)[name] for i, c in enumerate(counts))
        torch.testing.assert_close(state[name], average)


def test_experts_are_scored_where_this_process_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.parallel, "device", lambda: torch.device("meta"))
    seen = []

    def measured(model: Transformer) -> float:
        seen.append({p.device.type for p in model.parameters()})
        return float(len(seen))

    for model in (network(), mixture()):
        assert choice.losses_of(model, measured) == [1.0, 2.0, 3.0, 4.0]
        assert seen == [{"meta"}] * K and model.count == K
        seen.clear()


@given(st.integers(0, K - 1))
@examples(4)
def test_a_blend_of_one_cluster_is_its_expert(only: int) -> None:
    counts = np.eye(K)[only] * 7
    for model in (network(), mixture()):
        one = model.materialise(only)
        blend = model.materialise(choice.choose(model, "blend", counts).which)
        for name, tensor in one.items():
            torch.testing.assert_close(blend[name], tensor)


def test_a_histogram_of_another_clustering_is_refused() -> None:
    with pytest.raises(UserError, match="5 clusters and the network has 4 experts"):
        choice.choose(network(), "blend", np.ones(5))
    with pytest.raises(UserError, match="is empty"):
        choice.choose(network(), "most-frequent", np.zeros(4))


def test_similarity_sees_alike_experts() -> None:
    model = network()
    with torch.no_grad():
        model.experts[1] = model.experts[0]
    centroids = np.random.default_rng(0).normal(size=(K, 6))
    found = choice.similarity(model, centroids)
    assert found["experts"][0][1] == pytest.approx(1.0)
    assert np.allclose(np.diag(found["centroids"]), 1.0)
    # experts that are a linear map of the centroids are exactly as alike as these
    orthogonal = network()
    with torch.no_grad():
        orthogonal.experts.copy_(torch.randn(K, 5))
        for name in orthogonal.names:
            orthogonal.bank(name).mixing.copy_(orthogonal.bank(orthogonal.names[0]).mixing)
        mixed = orthogonal.experts @ orthogonal.bank(orthogonal.names[0]).mixing
    assert choice.similarity(orthogonal, mixed.numpy())["correlation"] == pytest.approx(1.0)
    assert choice.similarity(mixture(), centroids)["experts"][0][3] == pytest.approx(-1.0)


def test_similarity_is_numpys_of_the_experts_and_of_the_centroids() -> None:
    model, centroids = network(3), np.random.default_rng(1).normal(size=(K, 6))
    found = choice.similarity(model, centroids)
    with torch.no_grad():
        alpha = np.concatenate([part.double().numpy() for part in
                                model.coefficients(model.experts).values()], 1)

    def cosines(points: np.ndarray) -> np.ndarray:
        centred = points - points.mean(0)
        return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in centred]
                         for a in centred])

    for ours, points in (("experts", alpha), ("centroids", centroids)):
        assert np.allclose(found[ours], cosines(points))
    pairs = [(i, j) for i in range(K) for j in range(i)]
    series = [[cosines(points)[pair] for pair in pairs] for points in (alpha, centroids)]
    assert found["correlation"] == pytest.approx(np.corrcoef(series)[0, 1])
    assert abs(found["correlation"]) < 0.99


def test_experts_to_be_filled_are_of_the_banks_kind() -> None:
    settings = keys.Projected(experts=3, rank=2, embedding=2)
    bank, models = (choice.empty(kind, SHAPE, 5, settings) for kind in ("projected", "mixture"))
    assert isinstance(bank, Projected) and bank.count == 3
    assert isinstance(models, Mixture) and models.count == 5


def test_tuning_the_vector_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "bf16_is_fast", lambda device: False)  # validations in float32
    model = network()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = model.blend(torch.ones(K))
    train = keys.Train(batch_tokens=32, microbatch_tokens=16, precision="fp32", compile="no",
                         optimizer=keys.Optimizer(lr=0.2, embedding_lr=0.1, schedule="constant"))
    tuned, outcome = vector.tune_vector(model, start, Fixed(), 30, train, tmp_path, validate=loss)
    first, last = (loss(dense(model.materialise(v))) for v in (start, tuned))
    assert last < first - 0.02
    assert outcome.first_validation == pytest.approx(first, rel=1e-5)
    assert outcome.best_validation == pytest.approx(last, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad
        assert parameter.grad is None


def test_gradient_of_the_vector_is_autograds() -> None:
    model = network().double()
    start = torch.randn(5, dtype=torch.float64)
    trainable = vector.Vector(model, start)
    batch = Fixed().batch(0, 4)
    trainable.begin(batch.groups)
    for rows in trainable.microbatches(batch.groups, 2):
        model.body(batch.inputs[rows]).square().sum().backward()
    trainable.end()
    leaf = start.clone().requires_grad_()
    weights = {n.removeprefix("body."): p for n, p in model.named_parameters()
               if n.startswith("body.")}
    for name in model.names:
        bank = model.bank(name)
        weights[name] = torch.einsum("q,qr,roi->oi", leaf, bank.mixing, bank.slices)
    twin = Transformer(SHAPE).double()
    torch.func.functional_call(twin, weights, (batch.inputs,)).square().sum().backward()
    assert trainable.vector.grad is not None and leaf.grad is not None
    assert ((trainable.vector.grad - leaf.grad).norm() / leaf.grad.norm()).item() < 1e-12
