"""Selectors as stages: what they choose by, what they choose, and what it costs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from planearly.data.dataset import TokenDataset
from planearly.data.pack import Rows
from planearly.files import read_array, read_json
from planearly.stages import corpus, pipeline, selection, training
from planearly.stages.folder import Run
from small_runs import recipe


@pytest.mark.slow
def test_text_is_chosen_by_two_models_losses_and_by_a_linear_head(made, tmp_path):
    out = tmp_path / "run"
    more = {"methods": ["slm-color", "slm-linear", "slm"],
            "pretrain": {"batch_tokens": 128, "compile": "no", "precision": "fp32"}}

    def stage(name):
        return next(out.glob(f"{name}-????????"))

    def flops(name):
        return read_json(stage(name) / "manifest.json")["cost"]["flops"]

    rows = {row["method"]: row for row in pipeline.run(recipe(made, **more), out)["rows"]}
    color, plain = rows["slm-color"], rows["slm"]
    assert color["ppl_before"] < plain["ppl_before"] > rows["slm-linear"]["ppl_before"]
    assert color["pretrain_tokens"] == pytest.approx(plain["pretrain_tokens"], rel=0.15)
    assert color["generic_cost"]["flops"] == flops("pretrain/slm") + flops("losses/slm")
    assert color["specialization_cost"]["flops"] == pytest.approx(sum(map(flops, (
        "specialize/slm.law", "losses/slm.law", "pretrain/slm-color.law",
        "specialize/slm-color.law"))))
    manifest = read_json(stage("selection/slm-linear.law") / "manifest.json")
    assert "candidates" not in manifest["settings"]["selection"]

    with Run(out, recipe(made, **more)).opened() as run:
        dataset, among = TokenDataset(corpus.generic(run)), selection.candidates(run)
        nats = {}
        for model in ("pretrain/slm", "specialize/slm.law"):
            kept = read_array(stage(model.replace(model.split("/")[0], "losses")) / "nats.npy")
            dense = training.load_model(stage(model))
            for i in range(0, len(among), len(among) // 20):
                tokens = torch.from_numpy(dataset.tokens(among[i]).astype(np.int64))
                with torch.no_grad():
                    logits = dense(tokens[None, :-1])[0].double()
                naive = F.cross_entropy(logits, tokens[1:]).item()
                assert kept[i] == pytest.approx(naive, rel=1e-4)
            nats[model] = kept
        need = selection.index(run, "law").need
    fall = nats["pretrain/slm"] - nats["specialize/slm.law"]
    taken, filled = set(), 0.0
    for i in sorted(range(len(among)), key=lambda i: (-fall[i], i)):
        if filled >= need:
            break
        taken.add(int(among[i]))
        filled += dataset.windows["length"][among[i]] / dataset.context
    assert taken == set(Rows.load(stage("selection/slm-color.law")).windows.tolist())

    few = recipe(made, **more, selection={"candidates": 0.25})
    with Run(out, few).opened() as run:
        some = selection.candidates(run)
        assert len(some) == round(0.25 * len(among)) and set(some) < set(among)
        chosen = set(Rows.load(selection.selection(run, "linear", "law")).windows.tolist())
        assert chosen and chosen <= set(some.tolist())
