"""Adaptation: between all pretraining before the domain is known, and all of it after."""

import pytest
from safetensors.torch import load_file

from planearly import config, methods
from planearly.cost import ledger
from planearly.errors import UserError
from planearly.files import read_json
from planearly.stages import pipeline, trained
from planearly.stages.folder import Run, facts
from planearly.train import loop
from small_runs import recipe as small


def recipe(root, names, **over):
    changes = {f"adapt.{key}": over.pop(key) for key in ("share", "specialization_share",
                                                         "replay_share") if key in over}
    return config.variant(small(root, methods=names, **over), changes)


def weights(stage):
    return load_file(stage / loop.FINAL)


def pretrained(root, out, names, method, domain="law", **over):
    run = Run(out, recipe(root, names, **over))
    with run.opened():
        return trained.pretrain(run, method, domain)


def same(one, other) -> bool:
    return all((one[name] == other[name]).all() for name in one)


def test_all_of_it_per_domain_is_importance_sampling(made, tmp_path):
    whole = pretrained(made, tmp_path, ["slm-is"], "slm-is")
    ours = pretrained(made, tmp_path, ["slm-adapt"], "slm-adapt", share=1.0)
    assert whole != ours and same(weights(whole), weights(ours))
    assert not list(tmp_path.glob("pretrain/slm-plateau-*"))


def test_adapting_to_generic_text_is_the_plain_model(made, tmp_path, monkeypatch):
    """Other rows after the branch are all that tells it from plain pretraining."""
    row = methods.TABLE["slm-adapt"]
    monkeypatch.setitem(trained.DRAWS, "later", lambda run, domain, rows=None: later(run))

    def later(run):
        return trained.as_it_is(run, "")

    from planearly.stages import adapt

    monkeypatch.setattr(adapt, "Later", lambda stream, start: stream)  # the same places as plain
    monkeypatch.setitem(methods.TABLE, "slm-adapt", methods.Method(
        row.name, row.label, row.sentence, adapts="later"))
    plain = pretrained(made, tmp_path / "a", ["slm"], "slm")
    ours = pretrained(made, tmp_path / "b", ["slm-adapt"], "slm-adapt")
    assert same(weights(plain), weights(ours))


def test_a_plain_model_beside_it_passes_over_the_plateau(made, tmp_path):
    alone = pretrained(made, tmp_path / "a", ["slm"], "slm")
    beside = pretrained(made, tmp_path / "b", ["slm-adapt", "slm"], "slm")
    assert same(weights(alone), weights(beside))
    assert facts(beside)["begun"]["at_step"] == 17  # of 24, as wsd decays in the last three tenths
    assert "begun" not in facts(alone)


@pytest.mark.slow
def test_costs_are_shared_and_the_row_is_whole(made, tmp_path):
    asked = recipe(made, ["slm", "slm-is", "slm-adapt"], specialization_share=0.25,
                   replay_share=0.25)
    results = pipeline.run(asked, tmp_path)
    rows = {row["method"]: row for row in results["rows"]}
    ours, plain = rows["slm-adapt"], rows["slm"]
    tokens = plain["pretrain_tokens"]
    assert ours["pretrain_tokens"] == pytest.approx(tokens, rel=0.02)
    assert ours["generic_cost"]["tokens"] == pytest.approx(tokens * 17 / 24, rel=0.02)
    tuned = plain["specialization_cost"]["tokens"]
    assert ours["specialization_cost"]["tokens"] - tuned == pytest.approx(tokens * 7 / 24, rel=0.02)
    assert ours["k"] == 3 and ours["ppl_before"] > 1
    summed = ledger.add_up([tmp_path])["methods"]["slm-adapt"]
    assert summed["generic"]["tokens"] == ours["generic_cost"]["tokens"]
    assert summed["total"]["tokens"] == ours["cost"]["tokens"]
    (stage,) = tmp_path.glob("pretrain/slm-adapt.law-*")
    drawn = read_json(stage / "manifest.json")["epochs"]["rows_drawn"]
    assert sum(drawn) == round(7 * 8 / 2)  # half of seven steps of eight rows


@pytest.mark.parametrize("stop", [17, 20])
def test_resumed_equals_uninterrupted(made, tmp_path, monkeypatch, stop):
    whole = pretrained(made, tmp_path / "a", ["slm-adapt"], "slm-adapt", specialization_share=0.2)
    real = loop.optim.set_rates
    done = []

    def dies(optimizers, settings, step, steps):
        done.append(step)
        if len(done) == stop:
            raise KeyboardInterrupt
        return real(optimizers, settings, step, steps)

    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    monkeypatch.setattr(loop.optim, "set_rates", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrained(made, tmp_path / "b", ["slm-adapt"], "slm-adapt", specialization_share=0.2)
    monkeypatch.setattr(loop.optim, "set_rates", real)
    again = pretrained(made, tmp_path / "b", ["slm-adapt"], "slm-adapt", specialization_share=0.2)
    assert same(weights(whole), weights(again))


def test_what_cannot_be_is_one_sentence(made):
    def refused(match, **over):
        with pytest.raises(UserError, match=match):
            trained.check(recipe(made, ["slm-adapt"], **over))

    refused(r"'adapt.share' is 0.1, less than the 0.3 in which the rate decays", share=0.1)
    refused("come to 1.2, which leaves no row", specialization_share=0.5, replay_share=0.7)
    pretrain = {"batch_tokens": 128, "compile": "no"}
    refused("is cosine, which has no part at a constant rate",
            pretrain={**pretrain, "optimizer": {"schedule": "cosine"}})
    refused("'adapt.share' is null.* give a share",
            pretrain={**pretrain, "optimizer": {"schedule": "inverse-sqrt"}})


def test_weights_are_made_for_the_rows_that_adaptation_draws(made, tmp_path):
    """A corpus that is too small to be drawn from for all of pretraining may do for its last part.
    """
    importance = {"max_epochs": 1.0}
    out = tmp_path / "run"
    with pytest.raises(UserError, match="the generic corpus can supply"):
        pipeline.run(recipe(made, ["slm-is"], importance=importance,
                            pretrain_tokens=16 * 8 * 400), tmp_path / "is", until="weigh")
    pipeline.run(recipe(made, ["slm-adapt"], importance=importance,
                        pretrain_tokens=16 * 8 * 400), out, until="weigh")
    (stage,) = out.glob("weights/law-*")
    assert facts(stage)["weights"]["draws"] == 120 * 8


def test_the_plateau_s_checkpoints_are_paid_once(made, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    pretrained(made, tmp_path, ["slm-adapt"], "slm-adapt")
    costs = {path.name.rpartition("-")[0]: facts(path)["cost"]
             for path in tmp_path.glob("pretrain/*")}
    whole = read_json(next(tmp_path.glob("pretrain/slm-adapt.law-*")) / loop.OUTCOME)
    assert costs["slm-plateau"]["saving_hours"] > 0
    assert costs["slm-plateau"]["saving_hours"] + costs["slm-adapt.law"]["saving_hours"] == (
        pytest.approx(whole["saving_seconds"] / 3600, rel=0.2))
