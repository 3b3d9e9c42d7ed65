"""Losses of windows, a shard at a time: interrupted, and by several processes."""

from pathlib import Path

import numpy as np
import pytest

from planearly import keys, tensors
from planearly.data import tokenizer as tk
from planearly.data.build import tokenize_corpus
from planearly.data.dataset import TokenDataset
from planearly.data.inputs import resolve
from planearly.engine.local import Local
from planearly.evaluate import windows
from planearly.evaluate.perplexity import evaluate, forward_of
from planearly.model.transformer import Shape, Transformer
from small_trainings import Killed

WORDS = ["a", "small", "model", "reads", "windows", "of", "text", "and", "learns", "things"]


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Scores every third window of a corpus, five windows a shard; and what a plain loop says."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(2, 40))) for _ in range(30)]
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    tk.save(tk.train(texts, keys.Tokenizer(vocab_size=300)), tmp_path / "tokenizer")
    tokenize_corpus(resolve([str(tmp_path / "text")]), tmp_path / "tokenizer", 16, keys.Data(),
                    tmp_path / "tokens")
    dataset = TokenDataset(tmp_path / "tokens")
    model = Transformer(Shape(1, 32, 2, 48, dataset.meta["vocab_size"], 16), seed=1)
    tensors.save_tensors(tmp_path / "weights", tensors.weights(model), {})
    monkeypatch.setattr(windows, "_TOKENS", 5 * 16)
    chosen = np.arange(1, len(dataset), 3)

    def call(folder: str, workers: int = 1) -> np.ndarray:
        found, seconds = windows.window_losses(
            dataset, chosen, tmp_path / "weights", model.shape, False, Path(tmp_path / folder),
            Local(workers))
        assert seconds > 0 and not (tmp_path / folder).exists()
        return found

    whole = evaluate(forward_of(model), dataset, chosen)
    parts = np.split(whole.nll.astype(np.float64), np.cumsum(whole.lengths)[:-1])
    return call, np.array([part.mean() for part in parts])


def test_losses_are_means_over_the_windows_and_go_on_after_a_kill(tmp_path, monkeypatch, scored):
    call, expected = scored
    assert len(expected) > 10
    whole = call("whole")
    assert whole == pytest.approx(expected, rel=1e-5)
    score, calls = windows.score, []

    def killing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return score(*args)

    monkeypatch.setattr(windows, "score", killing)
    with pytest.raises(Killed):
        call("cut")
    assert call("cut").tolist() == whole.tolist()
    assert len(calls) == -(-len(expected) // 5) + 1


@pytest.mark.slow
def test_losses_by_several_processes_are_those_of_one(monkeypatch, scored):
    call, _ = scored
    monkeypatch.setattr(windows, "_FEW", 0)
    assert call("two", 2).tolist() == call("one").tolist()
