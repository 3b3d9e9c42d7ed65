"""Adaptation: between all pretraining before the domain is known, and all of it after."""

import typing

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from planearly import config, keys, methods
from planearly.cost import devices, ledger
from planearly.errors import UserError
from planearly.files import read_json
from planearly.model import flops
from planearly.plan import law, predict
from planearly.stages import clusters, doctor, pipeline, selection, trained, training
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from planearly.train import loop
from small_runs import recipe as small

NETWORK = {"projected": {"experts": 3, "rank": 2, "embedding": 3}}


def recipe(root, names, **over):
    changes = {f"adapt.{key}": over.pop(key) for key in ("share", "draws", "specialization_share",
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


CONSTANT = {"batch_tokens": 128, "compile": "no",
            "optimizer": {"schedule": "constant", "preset": "adamw"}}


@pytest.mark.parametrize(("method", "base"), [("slm-adapt", "slm"), ("slm-pn-adapt", "slm-pn")])
def test_without_a_step_of_its_own_it_is_its_base(made, tmp_path, method, base):
    def model(name):
        run = Run(tmp_path / name, recipe(made, [name], share=0.0, pretrain=CONSTANT, **NETWORK))
        with run.opened():
            return weights(trained.specialize(run, name, "law").base)

    ours, theirs = model(method), model(base)
    assert ours.keys() == theirs.keys() and same(ours, theirs)


def test_an_expert_goes_on_with_the_state_of_what_it_shares(made, tmp_path, monkeypatch):
    """The first step after the network's plateau, beside one made by hand."""
    begun = []
    real = loop.state.load_training

    def load(path, module, *more):
        begun.append((load_file(path), {name for name, _ in module.named_parameters()}))
        return real(path, module, *more)

    monkeypatch.setattr(loop.state, "load_training", load)
    pretrained(made, tmp_path, ["slm-pn-adapt"], "slm-pn-adapt", **NETWORK)
    (checkpoint, names), = begun
    (network,) = tmp_path.glob("pretrain/slm-pn-plateau-*/branch-17.safetensors")
    (expert,) = tmp_path.glob("expert/slm-pn-adapt.law-*")
    whole, dense = load_file(network), weights(expert)
    assert same(dense, checkpoint) and dense.keys() == names
    kept = {key.removeprefix("optimizer/").rpartition("/")[0]
            for key in checkpoint if key.startswith("optimizer/")}
    assert names - kept == {f"blocks.0.ffn.{m}.weight" for m in ("gate", "up", "down")}
    for key, value in checkpoint.items():
        if key.startswith("optimizer/"):
            assert torch.equal(value, whole[key.replace("optimizer/", "optimizer/body.")])


def test_all_of_it_per_domain_is_importance_sampling(made, tmp_path):
    whole = pretrained(made, tmp_path, ["slm-is"], "slm-is")
    ours = pretrained(made, tmp_path, ["slm-adapt"], "slm-adapt", share=1.0)
    assert whole != ours and same(weights(whole), weights(ours))
    assert not list(tmp_path.glob("pretrain/slm-plateau-*"))


def test_adapting_to_the_corpus_as_it_is_is_the_plain_model(made, tmp_path):
    """Its rows are those that the plateau would go on with, so nothing tells the two apart; with
    some of the domain's own text it goes on with the same rows, fewer of them."""
    plain = pretrained(made, tmp_path, ["slm"], "slm")
    ours = pretrained(made, tmp_path, ["slm-adapt"], "slm-adapt", draws="generic")
    assert plain != ours and same(weights(plain), weights(ours))
    known = [np.array(read_json(next(tmp_path.glob(f"pretrain/{name}-????????")) / "manifest.json")
                      ["epochs"]["rows_drawn"]) for name in ("slm", "slm-plateau", "slm-adapt.law")]
    assert (known[0] == known[1] + known[2]).all()
    mixed = pretrained(made, tmp_path / "b", ["slm-adapt"], "slm-adapt", draws="generic",
                       specialization_share=0.25)
    assert not same(weights(plain), weights(mixed))
    assert sum(facts(mixed)["epochs"]["rows_drawn"]) == round(7 * 8 * 0.75)
    assert not list(tmp_path.glob("b/weights/*"))


def test_each_kind_of_row_has_its_share(made, tmp_path, monkeypatch):
    """Rows that look like the domain, the domain's own, and replay of the corpus as it is."""
    class Begun(Exception):
        pass

    def begin(model, stream, steps, *more, **named):
        raise Begun(stream.batch(0, 8 * steps))

    monkeypatch.setattr(loop, "train", begin)
    run = Run(tmp_path, recipe(made, ["slm-adapt"], share=1.0, specialization_share=0.25,
                               replay_share=0.125))
    with run.opened(), pytest.raises(Begun) as begun:
        trained.pretrain(run, "slm-adapt", "law")
    (batch,) = begun.value.args
    assert len(batch) == 192
    packed, (weighed,) = clusters.rows(run, 3), tmp_path.glob("weights/law-*")
    for share, stream in (
            (0.625, training.generic_stream(run, packed, training.weights_of(weighed))),
            (0.25, training.domain_stream(run, "law")[0]),
            (0.125, training.generic_stream(run, packed, clusters.generic_weights(packed)))):
        rows = iter(batch.inputs.tolist())  # in their order, between others
        assert all(row in rows for row in stream.batch(0, round(192 * share)).inputs.tolist())
    assert (batch.groups == -1).sum() == 192 * 0.375


@pytest.mark.parametrize("method", ["slm-adapt", "slm-pn-adapt"])
def test_a_selector_takes_as_much_as_adaptation_passes_over(made, tmp_path, method):
    out, few = tmp_path / "run", {"selection": {"epochs": 2.0}, "expert": "blend", **NETWORK}
    ours = pretrained(made, out, [method], method, draws="dsir", **few)
    (stage,) = out.glob("selection/slm-dsir.law-*")
    drawn, available = (facts(ours)["epochs"][f"rows_{what}"] for what in ("drawn", "available"))
    assert sum(drawn) == 7 * 8 and sum(available) == facts(stage)["rows"]
    assert facts(stage)["epochs"] == pytest.approx(2.0, rel=0.1)
    assert not list(out.glob("weights/*"))
    # the whole of a pretraining takes its own, larger selection
    run = Run(out, recipe(made, ["slm-dsir"], **few))
    with run.opened():
        assert facts(selection.selection(run, "dsir", "law"))["rows"] > 2 * facts(stage)["rows"]
    text = methods.of(recipe(made, [method], draws="dsir"), method).sentence
    assert "a selector (dsir) takes for the domain" in text


@pytest.mark.slow
def test_the_selector_is_paid_and_what_it_shares_counted_once(made, tmp_path):
    asked = recipe(made, ["slm-adapt"], draws="color", spec_tokens=200)
    (row,) = pipeline.run(asked, tmp_path)["rows"]

    def cost(name):
        (stage,) = tmp_path.glob(f"{name}-????????")
        return facts(stage)["cost"]

    whole = cost("pretrain/slm")["flops"]
    assert row["draws"] == "color" and "a selector (color) takes" in (
        tmp_path / row["model"] / "README.md").read_text()
    assert row["pretrain_tokens"] == sum(
        cost(f"pretrain/{name}")["tokens"] for name in ("slm-plateau", "slm-adapt.law"))
    assert row["generic_cost"]["flops"] == pytest.approx(whole + cost("losses/slm")["flops"])
    own = ("specialize/slm.law", "losses/slm.law", "pretrain/slm-adapt.law",
           "specialize/slm-adapt.law")
    assert row["specialization_cost"]["flops"] == pytest.approx(
        sum(cost(name)["flops"] for name in own))
    summed = ledger.add_up([tmp_path])
    assert summed["methods"]["slm-adapt"]["generic"]["flops"] == pytest.approx(
        row["generic_cost"]["flops"])
    found = predict.predict(asked, devices.find("a100"))
    names = {entry["stage"] for entry in found["stages"]}
    assert {"pretrain/slm-plateau", "pretrain/slm", "losses/slm", "losses/slm.law"} <= names
    assert law.plain({"rows": [row]}) == [] and doctor.examine(tmp_path).well


def test_settings_of_finished_stages_are_as_before(made, tmp_path):
    """The key's default is what older versions did, under the same fingerprints."""
    stage = pretrained(made, tmp_path, ["slm-adapt"], "slm-adapt")
    (weighed,) = tmp_path.glob("weights/law-*")
    (rows,) = tmp_path.glob("rows/k3-*")
    manifest = read_json(stage / "manifest.json")
    assert manifest["settings"].keys() == {"shape", "train", "steps", "seed", "shares"}
    assert manifest["inputs"].keys() == {"rows", "weights", "plateau"}
    assert manifest["inputs"]["rows"] == read_json(rows / "manifest.json")["fingerprint"]
    assert manifest["inputs"]["weights"] == read_json(weighed / "manifest.json")["fingerprint"]


@pytest.mark.parametrize("base", ["slm", "slm-pn"])
def test_its_base_beside_it_passes_over_the_plateau(made, tmp_path, base):
    alone = pretrained(made, tmp_path / "a", [base], base, **NETWORK)
    beside = pretrained(made, tmp_path / "b", [f"{base}-adapt", base], base, **NETWORK)
    assert same(weights(alone), weights(beside))
    assert facts(beside)["begun"]["at_step"] == 17  # of 24, as wsd decays in the last three tenths
    assert "begun" not in facts(alone)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["slm", "slm-pn"])
def test_costs_are_shared_and_the_row_is_whole(made, tmp_path, base):
    method = f"{base}-adapt"
    asked = recipe(made, [base, method], specialization_share=0.25, replay_share=0.25,
                   expert="blend", **NETWORK)
    results = pipeline.run(asked, tmp_path)
    rows = {row["method"]: row for row in results["rows"]}
    ours, plain = rows[method], rows[base]
    tokens = plain["pretrain_tokens"]
    assert ours["pretrain_tokens"] == pytest.approx(tokens, rel=0.02)
    assert ours["generic_cost"]["tokens"] == pytest.approx(tokens * 17 / 24, rel=0.02)
    tuned = plain["specialization_cost"]["tokens"]
    assert ours["specialization_cost"]["tokens"] - tuned == pytest.approx(tokens * 7 / 24, rel=0.02)
    assert ours["k"] == 3 and ours["ppl_before"] > 1
    assert ours.get("expert") == plain.get("expert") and ours["params"] == plain["params"]
    assert base in ours["model"] and "generic_ppl_routed" in ours
    summed = ledger.add_up([tmp_path])["methods"][method]
    assert summed["generic"]["tokens"] == ours["generic_cost"]["tokens"]
    assert summed["total"]["tokens"] == ours["cost"]["tokens"]
    (stage,) = tmp_path.glob(f"pretrain/{method}.law-*")
    assert facts(stage)["cost"]["flops"] == flops.training(training.shape_made(stage)) * facts(
        stage)["cost"]["tokens"]  # a dense model's, whatever it began as
    drawn = read_json(stage / "manifest.json")["epochs"]["rows_drawn"]
    assert sum(drawn) == round(7 * 8 / 2)  # half of seven steps of eight rows


@pytest.mark.parametrize(("method", "stop", "draws"), [
    ("slm-adapt", 17, "importance"), ("slm-adapt", 20, "generic"), ("slm-adapt", 20, "linear"),
    ("slm-pn-adapt", 9, "importance"), ("slm-pn-adapt", 20, "importance")])
def test_resumed_equals_uninterrupted(made, tmp_path, monkeypatch, method, stop, draws):
    def train(out):
        return pretrained(made, out, [method], method, specialization_share=0.2, draws=draws,
                          **NETWORK)

    whole = train(tmp_path / "a")
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
        train(tmp_path / "b")
    monkeypatch.setattr(loop.optim, "set_rates", real)
    again = train(tmp_path / "b")
    assert same(weights(whole), weights(again))


def test_what_cannot_be_is_one_sentence(made, monkeypatch):
    def refused(match, method="slm-adapt", **over):
        with pytest.raises(UserError, match=match):
            trained.check(recipe(made, [method], **over))

    refused("leave slm-pn-adapt no step before it adapts", "slm-pn-adapt", share=1.0, **NETWORK)
    monkeypatch.setitem(methods.TABLE, "slm-mix-adapt", methods.Method(
        "slm-mix-adapt", "", "", bank="mixture", adapts="importance"))
    refused("adapts to a domain from what is no plain pretraining", "slm-mix-adapt")

    refused(r"'adapt.share' is 0.1, less than the 0.3 in which the rate decays", share=0.1)
    refused("come to 1.2, which leaves no row", specialization_share=0.5, replay_share=0.7)
    refused("'adapt.replay_share' is 0.1, and 'adapt.draws=generic' draws .* leave one of them",
            draws="generic", replay_share=0.1)
    refused("'adapt.draws' is 'dsri'; choose from importance, generic, dsir", draws="dsri")
    assert set(typing.get_args(typing.get_type_hints(keys.Adapt)["draws"])) == set(trained.DRAWS)
    pretrain = {"batch_tokens": 128, "compile": "no"}
    refused("is cosine, which has no part at a constant rate",
            pretrain={**pretrain, "optimizer": {"schedule": "cosine"}})
    refused("'adapt.share' is null.* give a share",
            pretrain={**pretrain, "optimizer": {"schedule": "inverse-sqrt"}})


def test_a_share_that_adaptation_does_not_read_is_told(made, tmp_path, capsys):
    pretrain = {"batch_tokens": 128, "compile": "no", "specialization_share": 0.2}

    def told(names, **over):
        pipeline.run(recipe(made, names, pretrain=pretrain, **over), tmp_path, "prepare")
        return "adapt.specialization_share' for the domain's own" in capsys.readouterr().err

    assert told(["slm-is", "slm-adapt"])
    assert not told(["slm-adapt"], specialization_share=0.1)
    assert not told(["slm-is"])


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
    (stage,) = tmp_path.glob("pretrain/slm-adapt.law-*")
    whole, begun = (read_json(stage / name) for name in (loop.OUTCOME, "begun.json"))
    assert costs["slm-plateau"]["saving_hours"] > 0
    assert costs["slm-adapt.law"]["device_hours"] == pytest.approx(
        whole["seconds"] / 3600 - begun["device_hours"])
    assert "sharing" not in costs["slm-adapt.law"]  # nobody else had the device
    assert 0 < begun["device_hours"] <= costs["slm-plateau"]["device_hours"]
    assert costs["slm-plateau"]["saving_hours"] + costs["slm-adapt.law"]["saving_hours"] == (
        pytest.approx(whole["saving_seconds"] / 3600, rel=0.2))
