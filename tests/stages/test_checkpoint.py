"""Starting from an open checkpoint: its shape, tokens and weights; and what cannot."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from planearly import config, keys, storage, tensors
from planearly.cost import devices
from planearly.data import tokenizer
from planearly.errors import UserError
from planearly.evaluate.files import evaluate_files
from planearly.export import bundle
from planearly.files import read_json, write_json
from planearly.model import hf, starts
from planearly.model.transformer import Transformer
from planearly.plan import recipes
from planearly.plan.inputs import OpenModel, PlanInput
from planearly.plan.options import CHECKPOINT
from planearly.plan.recommend import recommend
from planearly.stages import bundled, checkpoint, corpus, pipeline, trained, training
from planearly.stages.folder import Run
from planearly.train import loop
from small_models import tokenizer_folder
from small_outside import FAMILIES, llama_folder, logits, outside_folder
from small_runs import Words, recipe
from small_stores import fill, put
from small_trainings import killed_after_steps

PROJECTED = {"experts": 3, "rank": 2, "embedding": 3}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """An open checkpoint: Llama with grouped queries, its output matrix padded, as often."""
    return llama_folder(tmp_path / "llama")


def settings(root: Path, start: Path | None, **over) -> keys.Recipe:
    return recipe(root, **{"start": str(start) if start else None, "methods": ["slm"],
                           "context": 48, **over})


def expected(folder: Path, inputs: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(inputs).logits


def test_a_model_in_a_store_is_that_of_a_folder(made, llama, tmp_path, memory):
    fill(f"{memory}/llama", llama)
    for place in (llama, f"{memory}/llama"):
        run = Run(tmp_path / "run", settings(made, place))
        with run.opened():
            checkpoint.checkpoint(run), checkpoint.companions(run), corpus.tokenizer_folder(run)
    assert not run.made and len(run.reused) == 3
    taught = config.variant(settings(made, None), {
        "methods": ["slm-d"], "distill": {"teacher": f"{memory}/llama"},
        "tokenizer": {"path": f"{memory}/llama/tokenizer.json"}})
    trained.check(taught)
    tokens = []
    for _ in range(2):
        run = Run(tmp_path / "taught", taught)
        with run.opened():
            tokens.append(corpus.tokenizer_folder(run))
        assert tokenizer.other_vocabulary(tokenizer.load(tokens[-1]), llama) is None
        put(f"{memory}/llama/tokenizer_config.json", b"{}")
        storage.local.cache_clear()
    assert tokens[0] != tokens[1]  # the files have changed
    with pytest.raises(UserError, match=r"here/none does not exist: check the bucket"):
        trained.check(settings(made, f"{memory}/none"))


@pytest.mark.slow
def test_every_method_begins_as_the_checkpoint(made, llama, tmp_path):
    out = tmp_path / "run"
    methods = ["slm", "slm-is", "slm-pn", "slm-mix"]
    asked = settings(made, llama, methods=methods, projected=PROJECTED, mixture={"experts": 3})
    results = pipeline.run(asked, out)
    assert [row["method"] for row in results["rows"]] == methods
    for row in results["rows"]:
        found = read_json(out / row["model"] / "config.json")
        assert found["num_key_value_heads"] == 2 and found["rope_theta"] == 5000.0
        assert found["vocab_size"] == 304 and found["max_position_embeddings"] == asked.context
        card = (out / row["model"] / "README.md").read_text()
        assert "began as those of `llama`" in card  # a published card tells no paths
        assert "generic corpus: `generic.jsonl`" in card and str(made) not in card
        assert row["ppl_after"] < row["ppl_before"]
    # its text is cut by the checkpoint's own tokens
    (tokens,) = out.glob("tokenizer-*")
    assert tokenizer.other_vocabulary(tokenizer.load(tokens), llama) is None
    # all that is trained depends on the checkpoint's files, and was made from it
    (start,) = out.glob("pretrain/start-*")
    fingerprint = read_json(start / "manifest.json")["fingerprint"]
    trained = [read_json(p) for p in out.glob("pretrain/slm*/manifest.json")]
    assert len(trained) == 6
    assert all(stage["inputs"]["start"] == fingerprint for stage in trained)
    again = pipeline.run(asked, out)
    assert again["rows"] == results["rows"]
    assert len(list(out.glob("pretrain/*"))) == 7


@pytest.mark.parametrize("share", [None, 1.0])
def test_a_checkpoint_is_adapted_from(made, llama, tmp_path, share):
    """It is trained on for the first part, if there is one, and the last is drawn by importance;
    without a generic part it is importance sampling from the checkpoint."""
    def pretrain(method):
        run = Run(tmp_path / "run", config.variant(
            settings(made, llama, methods=[method], pretrain_tokens=48 * 2 * 10),
            {"adapt.share": share}))
        with run.opened():
            return trained.pretrain(run, method, "law")

    def manifest(stage):
        return read_json(stage / "manifest.json")

    ours = pretrain("slm-adapt")
    made_of = {path.name.rpartition("-")[0]: path for path in tmp_path.glob("run/pretrain/*")}
    (weights,) = tmp_path.glob("run/weights/law-*")
    start = manifest(made_of["start"])["fingerprint"]
    inputs = manifest(ours)["inputs"]
    assert (inputs["start"], inputs["weights"]) == (start, manifest(weights)["fingerprint"])
    if share:
        assert made_of.keys() == {"start", "slm-adapt.law"}
        one, other = (load_file(stage / loop.FINAL) for stage in (ours, pretrain("slm-is")))
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
        return
    first = made_of["slm-plateau"]
    assert inputs["plateau"] == manifest(first)["fingerprint"]
    assert manifest(first)["inputs"]["start"] == start
    states = [load_file(stage / loop.FINAL) for stage in (made_of["start"], first, ours)]

    def apart(one, other):
        return sum(float((one[key].float() - other[key].float()).square().sum()) for key in one)

    none = {key: torch.zeros_like(value) for key, value in states[0].items()}
    assert 0 < apart(*states[:2]) < 0.5 * apart(states[0], none) and apart(*states[1:]) > 0


@pytest.mark.slow
def test_experts_at_step_0_are_the_checkpoint(made, llama, tmp_path, monkeypatch):
    seen = []

    def train(model, stream, steps, *args, **kwargs):
        seen.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", train)
    for methods in (["slm-pn"], ["slm"]):
        asked = settings(made, llama, methods=methods, projected=PROJECTED)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(asked, tmp_path / "run")
    inputs = torch.arange(16)[None] * 7
    network, dense = seen
    logits = expected(llama, inputs)
    assert logits.std() > 0.1
    torch.testing.assert_close(dense.body(inputs), logits, rtol=0, atol=1e-5)
    for expert in range(3):
        model = Transformer(network.shape)
        tensors.set_weights(model, network.materialise(expert), "expert")
        with torch.no_grad():
            torch.testing.assert_close(model(inputs), logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_bundle_is_tuned_at_the_rates_of_the_run_that_began_as_a_checkpoint(
        made, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "load_embedder", lambda name, cache=None: Words())
    asked = config.variant(settings(made, llama, methods=["slm-pn"], projected=PROJECTED),
                           {"finetune.lr_scale": 0.5})
    pipeline.run(asked, tmp_path / "run", "specialize")
    (folder,) = tmp_path.glob("run/bundle/slm-pn-*/bundle")
    pipeline.run(bundled.from_bundle(folder, [str(made / "domains" / "law")], []),
                 tmp_path / "owner", "specialize")
    one, two = (load_file(next(tmp_path.glob(f"{name}/specialize/slm-pn.law-*/final.safetensors")))
                for name in ("run", "owner"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_killed_and_resumed_is_as_if_uninterrupted(made, llama, tmp_path, monkeypatch):
    asked = settings(made, llama, methods=["slm-pn"], projected=PROJECTED)
    pipeline.run(asked, tmp_path / "whole", "pretrain")
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    killed_after_steps(9, lambda: pipeline.run(asked, tmp_path / "cut", "pretrain"))
    pipeline.run(asked, tmp_path / "cut", "pretrain")
    one, two = (load_file(next(root.glob("pretrain/slm-pn-*/final.safetensors")))
                for root in (tmp_path / "whole", tmp_path / "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_without_pretraining_it_is_fine_tuned_as_it_is(made, llama, tmp_path):
    out = tmp_path / "run"
    asked = settings(made, llama, pretrain_tokens=0, generic=[], large_start=str(llama),
                     methods=["slm", "slm-nopt", "llm"],
                     finetune={"batch_tokens": 128, "max_epochs": 1, "scratch_epochs": 1})
    slm, nopt, llm = pipeline.run(asked, out)["rows"]
    assert slm["pretrain_tokens"] == 0 and slm["generic_cost"]["flops"] == 0
    assert slm["ppl_after"] < slm["ppl_before"] and slm["generic_ppl"] is None
    assert (llm["ppl_before"], llm["ppl_after"]) == (slm["ppl_before"], slm["ppl_after"])
    assert nopt["ppl_before"] is None and nopt["params"] == slm["params"]
    assert not list(out.glob("generic-*")) and not list(out.glob("clusters-*"))
    # with a generic corpus, what fine-tuning forgets of it is reported
    also = settings(made, llama, pretrain_tokens=0,
                    finetune={"batch_tokens": 128, "max_epochs": 1})
    with_generic = pipeline.run(also, out)["rows"][0]
    assert with_generic["generic_ppl"] > 0
    assert with_generic["ppl_after"] == slm["ppl_after"]


@pytest.mark.slow
@pytest.mark.parametrize("generic_tokens", [0, 20_000])
def test_a_planned_checkpoint_runs(made, llama, tmp_path, generic_tokens):
    plan = recommend(PlanInput(
        device=devices.from_sheet(devices.SHEETS[0]), limit=2_000_000, spec_tokens=5_000,
        generic_tokens=generic_tokens, generic_hours=0,
        checkpoint=OpenModel(str(llama), 1_000_000, 64)))
    assert plan.recommended == CHECKPOINT
    generic = [str(made / "generic.jsonl")] if generic_tokens else []
    (path,) = (p for p in recipes.write(plan, tmp_path, generic, [str(made / "domains" / "law")])
               if p.stem == CHECKPOINT)
    few = ["finetune.max_steps=3", "finetune.batch_tokens=512", "pretrain.batch_tokens=2048",
           "data.generic_eval_tokens=500"]
    row = pipeline.run(config.load(path, few), tmp_path / "run", "export")["rows"][0]
    assert row["method"] == ("slm-is" if generic_tokens else "slm")
    assert (row["pretrain_tokens"] > 0) == bool(generic_tokens)
    assert row["ppl_after"] < row["ppl_before"]


@pytest.mark.slow
def test_a_model_of_ours_is_a_checkpoint_too(made, tmp_path):
    first = pipeline.run(settings(made, None), tmp_path / "first")["rows"][0]
    folder = tmp_path / "first" / first["model"]
    again = pipeline.run(settings(made, folder, pretrain_tokens=0), tmp_path / "again")["rows"][0]
    assert again["ppl_before"] == pytest.approx(first["ppl_after"], rel=1e-5)


def test_a_run_without_a_checkpoint_is_addressed_as_before(made, llama, tmp_path):
    out, made_by = tmp_path / "run", {}
    for start in (None, llama, llama_folder(tmp_path / "other", seed=1)):
        run = Run(out, settings(made, start))
        with run.opened():
            stage = checkpoint.checkpoint(run)
            made_by[start] = stage
            assert (stage is None) == (start is None)
            shape = starts.shape(run.recipe)
            assert shape is None or shape.kv_heads == 2
    assert len({*made_by.values()}) == 3  # the files count, not their place
    shutil.copytree(llama, tmp_path / "moved")
    run = Run(out, settings(made, tmp_path / "moved"))
    with run.opened():
        assert checkpoint.checkpoint(run) == made_by[llama]


def test_what_cannot_start_is_one_sentence_before_anything_runs(made, llama, tmp_path):
    out = tmp_path / "run"

    def refused(match: str, start: Path | None = llama, **over) -> None:
        with pytest.raises(UserError, match=match):
            pipeline.run(settings(made, start, **over), out)
        assert not list(out.glob("generic-*"))

    refused("'start': .*nowhere does not exist", tmp_path / "nowhere")
    refused("has no config.json", made)
    refused("reads 64 tokens, fewer than 'context', 128", context=128)
    refused("'bundle' is one", bundle="x")
    refused("at least 2", methods=["slm-pn"], projected={**PROJECTED, "rank": 1})
    refused("'projected.deviation' above 0", methods=["slm-pn"],
            projected={**PROJECTED, "deviation": 0.0})
    refused("0, but slm-is has to pretrain; only slm", pretrain_tokens=0, methods=["slm-is"])
    refused("llm then needs 'large_start'", pretrain_tokens=0, methods=["llm"])
    with pytest.raises(UserError, match=r"pretrain_tokens' is 0.*positive, or 0 to fine-tune"):
        config.override({"pretrain_tokens": 0})
    pictures = tmp_path / "vit"
    shutil.copytree(llama, pictures)
    write_json(pictures / "config.json", {**read_json(llama / "config.json"),
                                          "model_type": "vit"})
    refused("a 'vit', which transformers does not know as a causal language model", pictures)
    own = tokenizer_folder(tmp_path / "own", entries=280)
    refused("'start': the checkpoint in .* another vocabulary .*missing here.*leave 'tokenizer",
            tokenizer={"path": str(own / "tokenizer.json")})
    refused("'large_start': the checkpoint in .* another vocabulary",
            large_start=str(llama_folder(tmp_path / "large", entries=290)))
    small = llama_folder(tmp_path / "small", vocab_size=299)
    refused("more entries than its model, 299", small)
    qwen = outside_folder(tmp_path / "qwen", "qwen3")
    for method in ("slm-pn", "slm-mix"):
        refused(f"'start': {method} trains experts .* cannot hold a 'qwen3'", qwen,
                methods=[method], projected=PROJECTED, mixture={"experts": 3})
    fp8 = tmp_path / "fp8"
    shutil.copytree(qwen, fp8)
    write_json(fp8 / "config.json", {**read_json(qwen / "config.json"),
                                     "quantization_config": {"quant_method": "fp8"}})
    refused("is quantized", fp8)
    refused("is quantized", llama, methods=["llm"], large_start=str(fp8), pretrain_tokens=0)
    refused("is quantized", llama, methods=["slm-d"], distill={"teacher": str(fp8)})


def test_weights_that_do_not_fit_their_configuration_are_one_sentence(llama):
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(32, 32)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    sentence = r"k_proj.weight' has shape \[32, 32\] and its config.json asks for \[16, 32\]"
    with pytest.raises(UserError, match=sentence):
        hf.from_hf(llama)


def test_a_bundle_that_began_as_a_checkpoint_no_longer_needs_it():
    kept = bundle.kept_recipe(config.override({"start": "/somewhere", "large_start": "x"}))
    assert not {"start", "large_start"} & kept.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_open_model_from_documents_to_an_exported_folder(made, family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = outside_folder(tmp_path / "model", family)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    methods = ["slm", "slm-is"] if family == "qwen3" else ["slm"]
    asked = settings(made, model, methods=methods, pretrain_tokens=48 * 8 * 4,
                     finetune={"batch_tokens": 512, "max_steps": 3, "compile": "no"})
    results = pipeline.run(asked, tmp_path / "run")
    (begun,) = (tmp_path / "run").glob("pretrain/start-*")
    inputs = torch.arange(16)[None] * 7
    with torch.no_grad():
        first = training.load_model(begun)(inputs)
    torch.testing.assert_close(first, logits(model, inputs), rtol=0, atol=1e-5)
    for row in results["rows"]:
        folder = tmp_path / "run" / row["model"]
        assert row["ppl_after"] < row["ppl_before"]
        found, given = (read_json(place / "config.json") for place in (folder, model))
        assert found["architectures"] == given["architectures"]
        assert (folder / "chat_template.jinja").exists()
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        begin = read_json(folder / "tokenizer_config.json")["bos_token"]
        assert begin == read_json(model / "tokenizer_config.json")["bos_token"]
        test = str(made / "domains" / "law" / "test.jsonl")
        again = evaluate_files(folder, [test], context=asked.context)
        assert again["tokens"] == row["test_tokens"]
        assert again["perplexity"] == pytest.approx(row["ppl_after"], rel=1e-4)


@pytest.mark.slow
def test_an_open_model_is_adapted_teaches_and_is_taught(made, tmp_path):
    model = outside_folder(tmp_path / "model", "gemma3")
    large = outside_folder(tmp_path / "large", "llama-3.2")
    asked = settings(made, model, methods=["slm", "llm", "llm-lora", "slm-nopt"],
                     large_start=str(large), pretrain_tokens=0,
                     finetune={"batch_tokens": 512, "max_steps": 3, "compile": "no"})
    rows = {row["method"]: row for row in pipeline.run(asked, tmp_path / "run")["rows"]}
    assert rows["llm-lora"]["adapter_params"] > 0
    assert rows["llm"]["ppl_before"] == rows["llm-lora"]["ppl_before"]
    assert rows["slm-nopt"]["params"] == rows["slm"]["params"]
    for top_k, teacher in ((None, str(large)), (4, None)):
        asked = settings(made, model, methods=["slm-d"], large_start=str(large),
                         distill={"teacher": teacher, "top_k": top_k}, pretrain_tokens=48 * 8 * 2,
                         finetune={"batch_tokens": 512, "max_steps": 3, "compile": "no"})
        (row,) = pipeline.run(asked, tmp_path / "run")["rows"]
        assert row["ppl_after"] < row["ppl_before"]


@pytest.mark.parametrize("knows", [True, False])
def test_where_a_checkpoint_begins_is_told_before_it_is_trained(
        made, tmp_path, capsys, monkeypatch, knows):
    model = llama_folder(tmp_path / "model", initializer_range=1e-6)
    if knows:
        monkeypatch.setattr(checkpoint, "mean_nll", lambda *_: 3.0)
    run = Run(tmp_path / "run", settings(made, model))
    with run.opened():
        checkpoint.tell_beginning(run, "law")
    told = capsys.readouterr().err
    begins = "3.000" if knows else "5.717"  # ln 304
    assert f"'start' begins at {begins} nats per token of law (chance: 5.717)" in told
    assert ("no more of this text than chance" in told) != knows


def test_copying_what_lies_beside_a_checkpoint_may_be_killed(made, llama, tmp_path, monkeypatch):
    run = Run(tmp_path / "run", settings(made, llama))
    with run.opened():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint.shutil, "copyfile", mock.Mock(side_effect=KeyboardInterrupt))
            checkpoint.companions(run)
        assert (checkpoint.companions(run) / "files" / "tokenizer.json").exists()


def test_one_checkpoint_at_two_contexts_has_one_tokenizer(tmp_path: Path, llama: Path) -> None:
    made = tmp_path / "out"
    for context in (48, 32):
        run = Run(made, settings(tmp_path, llama, context=context))
        with run.opened():
            folder = corpus.tokenizer_folder(run)
    assert list(made.glob("tokenizer-*")) == [folder]
    manifest = read_json(folder / "manifest.json")
    older = {**manifest["settings"], "context": 32}
    there = run.folder("tokenizer", older, {}, 1)
    folder.rename(there)
    again = Run(made, settings(tmp_path, llama, context=32))
    with again.opened():
        assert corpus.tokenizer_folder(again) == there


@pytest.mark.parametrize(("begun", "own", "named"), [
    ("someone/Base-1B@main", None, "someone/Base-1B"), ("hf://someone/Base-1B", None,
                                                        "someone/Base-1B"),
    ("someone/Base-1B", "other/Name", "other/Name"), ("/a/folder", None, None),
    (None, None, None)])
def test_a_card_names_the_model_that_it_began_as(begun, own, named):
    found = checkpoint.card_front(keys.Recipe(card=keys.Card(license="mit", base_model=own)), begun)
    assert found == {"license": "mit", **({"base_model": named} if named else {})}
