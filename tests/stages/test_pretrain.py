"""What a pretraining for one domain reads: the generic corpus, and from some step on its own text.
"""

from __future__ import annotations

import numpy as np
import pytest

from planearly.files import read_json
from planearly.stages import clusters, finetune, trained, training
from planearly.stages.folder import Run
from planearly.train import loop
from small_runs import recipe


class Begun(Exception):
    """With a training's stream."""


def stream_of(monkeypatch, train):
    def begin(model, stream, *more, **named):
        raise Begun(stream)

    monkeypatch.setattr(loop, "train", begin)
    with pytest.raises(Begun) as begun:
        train()
    return begun.value.args[0]


def test_the_domains_own_text_begins_after_its_share_of_the_steps(made, tmp_path, monkeypatch):
    """Before it the generic rows are those of a pretraining without it, and after it they go on
    where they were."""
    run = Run(tmp_path, recipe(made, methods=["slm-is"], pretrain={
        "batch_tokens": 128, "compile": "no", "specialization_share": 0.25,
        "specialization_after": 0.5}))
    with run.opened():
        stream = stream_of(monkeypatch, lambda: trained.pretrain(run, "slm-is", "law"))
        (weighed,) = tmp_path.glob("weights/law-*")
        generic = training.generic_stream(run, clusters.rows(run, 3), training.weights_of(weighed))
        own = training.domain_stream(run, "law")[0]
        batch = stream.batch(0, 24 * 8)
        assert batch.inputs[:96].equal(generic.batch(0, 96).inputs)
        for part in (generic.batch(96, 96 + 72), own.batch(0, 24)):
            rows = iter(batch.inputs[96:].tolist())  # in their order, between others
            assert all(row in rows for row in part.inputs.tolist())
        assert (batch.groups == -1).sum() == 24
        for start in range(0, 24 * 8 - 17, 17):
            assert stream.batch(start, start + 17).inputs.equal(batch.inputs[start:start + 17])
        assert read_json(weighed / "manifest.json")["weights"]["draws"] == 96 + 72


def test_what_is_replayed_looks_like_the_domain_where_it_is_to(made, tmp_path, monkeypatch):
    def tuned(draws):
        run = Run(tmp_path, recipe(made, methods=["slm"], finetune={
            "batch_tokens": 128, "compile": "no", "replay_share": 0.5, "replay_draws": draws}))
        with run.opened():
            base = trained.pretrain(run, "slm", "law")
            with monkeypatch.context() as patch:
                stream = stream_of(
                    patch, lambda: finetune.specialize(run, "slm", "law", base))
            assert (finetune.replayed(run, "law").by is not None) == (draws == "importance")
            weights = [clusters.generic_weights(clusters.rows(run, 3)), training.weights_of(
                clusters.importance_weights(run, "law"))][draws == "importance"]
            wanted = training.generic_stream(run, clusters.rows(run, 3), weights)
        rows = iter(stream.batch(0, 128).inputs.tolist())
        assert all(row in rows for row in wanted.batch(0, 60).inputs.tolist())
        return wanted.batch(0, 60).groups

    plain, alike = tuned("generic"), tuned("importance")
    assert not np.array_equal(np.bincount(plain), np.bincount(alike))
