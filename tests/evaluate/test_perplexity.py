"""Likelihoods against brute force, intervals against simulation."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly import files
from planearly.data.dataset import IGNORE
from planearly.evaluate import perplexity
from planearly.evaluate.show import show
from planearly.model.transformer import Shape, Transformer

CONTEXT, VOCABULARY = 16, 61


def dataset(lengths: list[int], documents: list[int], seed: int = 0) -> Any:
    """A token dataset in memory: windows of the given lengths, of the given documents."""
    generator = np.random.default_rng(seed)
    streams = [generator.integers(0, VOCABULARY, length + 1) for length in lengths]
    windows = np.array(list(zip(lengths, documents, strict=True)),
                       dtype=[("length", "u4"), ("document", "u8")])

    class Memory(SimpleNamespace):
        def __len__(self) -> int:
            return len(lengths)

        def rows(self, row_windows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            # padded inputs are a token that would change the result if it could be seen
            inputs = np.full((len(row_windows), CONTEXT), 7, np.int64)
            targets = np.full((len(row_windows), CONTEXT), IGNORE, np.int64)
            for row, (window,) in enumerate(row_windows):
                stream = streams[window]
                inputs[row, : len(stream) - 1] = stream[:-1]
                targets[row, : len(stream) - 1] = stream[1:]
            return inputs, targets

    return Memory(windows=windows, meta={"vocab_size": VOCABULARY}, streams=streams)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(Shape(2, 32, 4, 48, VOCABULARY, CONTEXT), seed=3)


def brute(model: Transformer, stream: np.ndarray) -> float:
    """Nats of a stream's targets, one token at a time, in float64 after the logits."""
    total = 0.0
    for i in range(1, len(stream)):
        with torch.no_grad():
            logits = model(torch.tensor(stream[None, :i]))[0, -1].double()
        total += float(torch.logsumexp(logits, 0) - logits[stream[i]])
    return total


@examples(15)
@given(st.lists(st.tuples(st.integers(1, CONTEXT), st.integers(0, 4)), min_size=1, max_size=12),
       st.integers(1, 40))
def test_equals_brute_force_whatever_the_batch(
    model: Transformer, windows: list[tuple[int, int]], batch: int
) -> None:
    lengths, documents = [list(column) for column in zip(*windows, strict=True)]
    data = dataset(lengths, documents)
    forward, sizes = perplexity.forward_of(model), []

    def counted(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sizes.append(inputs.shape)
        return forward(inputs, targets)

    nll = perplexity.score(counted, lambda ids: data.rows([np.array([i]) for i in ids]),
                           np.array(lengths), batch)
    assert all(rows == 1 or rows * time <= batch for rows, time in sizes)
    expected = [brute(model, stream) for stream in data.streams]
    found = [part.sum(dtype=np.float64) for part in np.split(nll, np.cumsum(lengths)[:-1])]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("device", "vocab_size", "positions"), [
    ("cpu", 8192, 1 << 11), ("cpu", 1 << 18, 1 << 10), ("cuda", 8192, 1 << 15),
    ("cuda", 1 << 18, 1 << 14)])
def test_a_pass_is_as_long_as_its_logits_allow(monkeypatch: pytest.MonkeyPatch, device: str,
                                               vocab_size: int, positions: int) -> None:
    monkeypatch.setattr(perplexity.parallel, "device", lambda: torch.device(device))
    assert perplexity.batch_tokens(vocab_size) == positions


def test_documents_are_the_units(model: Transformer) -> None:
    data = dataset([16, 5, 16, 16, 3], [0, 0, 2, 2, 2])
    nll, tokens = perplexity.document_nll(perplexity.forward_of(model), data)
    assert tokens.tolist() == [21, 35]
    expected = [brute(model, stream) for stream in data.streams]
    np.testing.assert_allclose(nll, [sum(expected[:2]), sum(expected[2:])], rtol=1e-5)


def test_one_document_is_divided_into_windows_and_one_window_into_tokens(
    model: Transformer,
) -> None:
    forward = perplexity.forward_of(model)
    _, tokens = perplexity.document_nll(forward, dataset([16, 16, 4], [5, 5, 5]))
    assert tokens.tolist() == [16, 16, 4]
    nll, tokens = perplexity.document_nll(forward, dataset([6], [0]))
    assert tokens.tolist() == [1] * 6 and len(set(nll)) == 6


def test_a_choice_of_windows(model: Transformer) -> None:
    data = dataset([16, 5, 16, 9], [0, 0, 1, 2])
    nll, tokens = perplexity.document_nll(perplexity.forward_of(model), data, np.array([3, 1]))
    expected = [brute(model, data.streams[1]), brute(model, data.streams[3])]
    assert tokens.tolist() == [5, 9]
    np.testing.assert_allclose(nll, expected, rtol=1e-5)
    assert perplexity.mean_nll(model, data, np.array([3, 1])) == pytest.approx(
        sum(expected) / 14, rel=1e-5)


def test_autocast_stays_within_a_thousandth(model: Transformer) -> None:
    data = dataset([16] * 30, list(range(30)))
    exact, fast = (perplexity.mean_nll(model, data, bf16=bf16) for bf16 in (False, True))
    assert fast != exact and fast == pytest.approx(exact, rel=1e-3)


def test_summary_in_numbers() -> None:
    # two documents at 2 and 4 bits per token: the mean weighs tokens, not documents
    nll, tokens = np.array([2 * 30, 4 * 10]) * np.log(2), np.array([30, 10])
    found = perplexity.summary(nll, tokens, n_bytes=80)
    assert found["tokens"] == 40 and found["units"] == 2
    assert found["nll_per_token"] == pytest.approx(2.5 * np.log(2), rel=1e-12)
    assert found["perplexity"] == pytest.approx(2**2.5, rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(100 / 80, rel=1e-12)
    # by hand: deviations -15, 15 bits; n/(n-1) = 2; error sqrt(2*450)/40 bits; t(1) = 12.706
    half = 12.7062047 * 30 / 40
    assert np.log2(found["ci95"]) == pytest.approx([2.5 - half, 2.5 + half], rel=1e-6)


def draw(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of random length whose tokens share the document's own mean (truth: 3 nats)."""
    tokens = generator.integers(20, 400, n)
    return tokens * generator.normal(3.0, 0.4, n), tokens


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator, trials = np.random.default_rng(0), 1000
    hits = np.zeros(3)
    for _ in range(trials):
        nll, tokens = draw(generator, 25)
        low, high = np.log(perplexity.summary(nll, tokens, 1)["ci95"])
        hits[0] += low < 3 < high
        low, high = perplexity.paired(nll, 3.1 * tokens, tokens)["ci95"]
        hits[1] += low < -0.1 < high
        low, high = np.log(perplexity.macro([draw(generator, n) for n in (8, 25, 60)])["ci95"])
        hits[2] += low < 3 < high
    # 95% of 1,000 is 950 with standard deviation 7
    assert ((hits / trials > 0.92) & (hits / trials < 0.98)).all(), hits


def test_pairing_removes_what_the_documents_share() -> None:
    generator = np.random.default_rng(1)
    nll, tokens = draw(generator, 200)
    better = nll - tokens * generator.normal(0.02, 0.01, 200)
    found = perplexity.paired(better, nll, tokens)
    assert found["ci95"][1] < 0
    assert found["difference"] == pytest.approx(-0.02, abs=0.002)
    low, high = np.log(perplexity.summary(nll, tokens, 1)["ci95"])
    assert high - low > 10 * (found["ci95"][1] - found["ci95"][0])


def test_macro_weighs_domains_alike() -> None:
    large = (np.array([400.0, 400.0, 410.0]), np.array([100, 100, 100]))
    small = (np.array([2.0, 2.2]), np.array([1, 1]))
    found = perplexity.macro([large, small])
    assert found["nll_per_token"] == pytest.approx((1210 / 300 + 2.1) / 2, rel=1e-12)
    assert found["perplexity"] == pytest.approx(np.exp(found["nll_per_token"]), rel=1e-12)
    assert found["ci95"][0] < found["perplexity"] < found["ci95"][1]


def test_logits_of_a_large_vocabulary_take_turns(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset([16, 5, 16, 9], [0, 0, 1, 2])
    whole = perplexity.evaluate(perplexity.forward_of(model), data)
    seen = []
    logits = Transformer.logits
    monkeypatch.setitem(perplexity._LOGITS, "cpu", 7 * VOCABULARY)
    monkeypatch.setattr(Transformer, "logits", lambda self, states: seen.append(
        len(states)) or logits(self, states))
    parts = perplexity.evaluate(perplexity.forward_of(model), data)
    assert max(seen) == 7
    np.testing.assert_allclose(parts.nll, whole.nll, rtol=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_perplexity_that_no_float_holds(capsys: pytest.CaptureFixture[str]) -> None:
    found = perplexity.summary(np.array([9e3, 9e3]), np.array([10, 10]), 60)
    assert found["perplexity"] == np.inf
    assert json.loads(files.line_of_json(found))["perplexity"] is None
    show({**found, "files": {"[bold].jsonl": found}})
    told = " ".join(capsys.readouterr().out.split())
    assert "above 1e300" in told and "[bold].jsonl" in told
