"""Every method end to end on a corpus made up here, and what is refused before anything runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from planearly import methods
from planearly.errors import UserError
from planearly.export import bundle
from planearly.files import read_json
from planearly.methods import Method
from planearly.model import flops, hf
from planearly.model.transformer import Shape
from planearly.stages import pipeline, trained
from small_models import model_folder, tokenizer_folder
from small_runs import METHODS, SHAPE, recipe


@pytest.mark.slow
def test_a_row_added_to_the_table_is_a_method(made, tmp_path, monkeypatch):
    large = Method("llm-is", "LLM-is", "large and resampled", size="large", draws="importance")
    adapted = Method("slm-lora", "SLM-LoRA", "small, adapted", tune="lora")
    bank = Method("llm-mix", "LLM-mix", "large experts", size="large", bank="mixture")
    for row in (large, adapted, bank):
        monkeypatch.setitem(methods.TABLE, row.name, row)
    out, names = tmp_path / "run", ["slm-is", "llm-is", "slm-lora", "llm-mix"]
    asked = recipe(made, methods=names, mixture={"experts": 3})
    rows = {row["method"]: row for row in pipeline.run(asked, out)["rows"]}
    assert list(rows) == names
    assert rows["llm-is"]["params"] > rows["slm-is"]["params"]
    assert rows["llm-is"]["k"] == rows["slm-is"]["k"] == 3
    assert rows["llm-is"]["generic_cost"]["flops"] == 0 < rows["slm-lora"]["generic_cost"]["flops"]
    assert rows["slm-lora"]["adapter_params"] > 0
    assert rows["llm-mix"]["params"] == 3 * rows["llm-mix"]["inference_params"]
    for row in rows.values():
        assert row["ppl_after"] < row["ppl_before"]
        assert (out / row["model"] / "model.safetensors").exists()
    assert len(list(out.glob("weights/law-*"))) == 1  # shared by both that resample
    (saved,) = out.glob("bundle/llm-mix-*/bundle")
    assert bundle.read_info(saved)["kind"] == "llm-mix"


@pytest.mark.parametrize(("columns", "sentence"), [
    ({"draws": "backwards"}, "has 'backwards' in the column 'draws'.*known are generic, import"),
    ({"bank": "savings"}, "has 'savings' in the column 'bank'.*known are projected, mixture"),
    ({"tune": "piano"}, "has 'piano' in the column 'tune'.*known are full, lora, distill"),
    ({"bank": "mixture", "draws": "dsir"}, "experts are pretrained on the generic corpus alone"),
    ({"tune": "distill", "draws": None}, "distils into a model without pretraining"),
])
def test_a_row_that_nothing_carries_out_is_one_sentence(made, monkeypatch, columns, sentence):
    monkeypatch.setitem(methods.TABLE, "new", Method("new", "New", "new", **columns))
    with pytest.raises(UserError, match=sentence):
        trained.check(recipe(made, methods=["new"]))


@pytest.mark.slow
def test_every_method_writes_its_row(made, tmp_path):
    out = tmp_path / "run"
    results = pipeline.run(recipe(made), out)
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == METHODS
    keys = {k for k in rows["slm"] if rows["slm"][k] is not None}
    for method, row in rows.items():
        missing = keys - row.keys()
        assert not missing
        assert (out / row["model"] / "model.safetensors").exists()
        assert np.isfinite(row["ppl_after"]) and row["best_step"] >= 0
        if method != "slm-nopt":
            assert row["ppl_before"] > 0
    assert rows["slm-nopt"]["ppl_before"] is None and rows["slm-nopt"]["pretrain_tokens"] == 0
    assert rows["slm-nopt"]["generic_cost"]["flops"] == 0
    small, large = (Shape(**read_json(path)["shape"]) for path in (
        next(out.glob(f"pretrain/{m}-????????/manifest.json")) for m in ("slm", "llm")))
    assert rows["llm"]["params"] == rows["llm-lora"]["params"] == flops.parameters(large)
    assert rows["slm-d"]["inference_params"] == flops.parameters(small)
    # the selectors see as many tokens as plain pretraining
    for method in ("slm-is", "slm-dsir", "slm-knn", "slm-top", "slm-color", "slm-linear"):
        assert rows[method]["pretrain_tokens"] == pytest.approx(
            rows["slm"]["pretrain_tokens"], rel=0.15)
    # the teacher is paid: pretrained once, fine-tuned for the domain, run beside the student
    def cost(kind, method):
        return read_json(next(out.glob(f"{kind}/{method}-????????/manifest.json")))["cost"]["flops"]

    d, tuned = rows["slm-d"], cost("specialize", "slm-d.law")
    assert d["generic_cost"]["flops"] == cost("pretrain", "slm") + cost("pretrain", "llm")
    assert d["specialization_cost"]["flops"] == cost("specialize", "llm.law") + tuned
    manifest = read_json(next(out.glob("specialize/slm-d.law-*/manifest.json")))
    assert tuned == manifest["cost"]["tokens"] * (
        flops.training(small) + flops.forward(large))
    assert manifest["cost"]["teacher"] == {
        "flops": manifest["cost"]["tokens"] * flops.forward(large), "d_model": large.d_model}
    lora = read_json(next(out.glob("specialize/llm-lora.law-*/manifest.json")))
    assert lora["cost"]["flops"] == lora["cost"]["tokens"] * flops.lora_training(large, 4)
    # what the selectors took is about the domain
    for method in ("slm-dsir", "slm-knn", "slm-top", "slm-color", "slm-linear"):
        assert rows[method]["ppl_before"] < rows["slm"]["ppl_before"]
    # nothing is done twice
    again = pipeline.run(recipe(made), out)
    assert again["rows"] == results["rows"]
    assert len(list(out.glob("specialize/*"))) == len(METHODS)


def prepared(root: Path, out: Path, **over):
    """A run up to the distilled student, with its small model pretrained."""
    return pipeline.run(recipe(root, methods=["slm-d"], **over), out)["rows"][0]


def test_a_teacher_pretrained_on_tokens_of_its_own(made, tmp_path):
    row = prepared(made, tmp_path, distill={"teacher_tokens": 16 * 8 * 6})

    def cost(method):
        return read_json(next(tmp_path.glob(f"pretrain/{method}-????????/manifest.json")))["cost"]

    assert cost("slm")["tokens"] == pytest.approx(16 * 8 * 24, rel=0.02)
    assert cost("llm")["tokens"] == pytest.approx(16 * 8 * 6, rel=0.02)
    assert row["pretrain_tokens"] == cost("slm")["tokens"]
    assert row["generic_cost"]["flops"] == cost("slm")["flops"] + cost("llm")["flops"]


@pytest.mark.slow
def test_a_teacher_from_outside_live_stored_and_on_generic_text(made, tmp_path):
    teacher = tmp_path / "teacher"
    llm = pipeline.run(recipe(made, methods=["llm"]), tmp_path / "run")["rows"][0]
    shutil.copytree(tmp_path / "run" / llm["model"], teacher)
    entries = hf.from_hf(teacher)[0].vocab_size
    given = {"teacher": str(teacher)}
    live = prepared(made, tmp_path / "run", distill=given)
    stored = prepared(made, tmp_path / "run", distill={**given, "top_k": entries})
    few = prepared(made, tmp_path / "run", distill={**given, "top_k": 4})
    mixed = prepared(made, tmp_path / "run", distill={**given, "on": "importance"})
    assert stored["ppl_after"] == pytest.approx(live["ppl_after"], rel=1e-3)
    assert live["generic_cost"]["flops"] < llm["generic_cost"]["flops"]  # no teacher is trained
    shape = hf.from_hf(teacher)[0]
    found = read_json(tmp_path / "run" / "results.json")
    assert found["rows"][0]["ppl_after"] == mixed["ppl_after"]
    small = Shape(1, 32, 2, 48, entries, 16)
    assert live["specialization_cost"]["flops"] == (
        live["specialization_cost"]["tokens"] * (
            flops.training(small) + flops.forward(shape)))
    notes = list((tmp_path / "run").glob("specialize/slm-d.law-*/teacher/stored.json"))
    assert sorted(read_json(n)["k"] for n in notes) == [4, entries]
    once = read_json(notes[0])["flops"]
    assert few["specialization_cost"]["flops"] == (
        few["specialization_cost"]["tokens"] * flops.training(small) + once)


def refused(root: Path, out: Path, match: str, **over) -> None:
    with pytest.raises(UserError, match=match):
        pipeline.run(recipe(root, **over), out)


def test_bad_input_is_one_sentence_before_anything_runs(made, tmp_path):
    out = tmp_path / "run"
    lora, d = {"methods": ["llm-lora"]}, {"methods": ["slm-d"]}
    refused(made, out, "methods' names 'slm-xx'; known are slm, slm-nopt", methods=["slm-xx"])
    refused(made, out, r"lora\.rank' is 64.*32 x 32", **lora, lora={"rank": 64}, large=SHAPE)
    refused(made, out, "teacher': .*nowhere does not exist", **d,
            distill={"teacher": str(tmp_path / "nowhere")})
    refused(made, out, "top_k' stores answers to the specialization set only", **d,
            distill={"top_k": 4, "on": "importance"})
    teacher = model_folder(tmp_path / "teacher", context=8)
    refused(made, out, r"teacher_tokens' is for a teacher that the run pretrains", **d,
            distill={"teacher": str(teacher), "teacher_tokens": 1000})
    refused(made, out, "reads 8 tokens, fewer than 'context', 16", **d,
            distill={"teacher": str(teacher)})
    for weights in teacher.glob("*.safetensors"):
        weights.unlink()
    refused(made, out, r"no model\.safetensors", **d, distill={"teacher": str(teacher)})
    assert not out.exists()


def test_what_needs_a_domain_says_so_before_it_reads_anything(made, tmp_path):
    out, none = tmp_path / "run", {"domains_root": None}
    for method in sorted(METHODS):
        refused(made, out, "needs a domain and none is given: set 'domains=", methods=[method],
                **none)
    for method in ("slm-is", "slm-dsir", "slm-knn", "slm-top", "slm-color", "slm-linear"):
        with pytest.raises(UserError, match=f"the pretraining of {method} needs a domain"):
            pipeline.run(recipe(made, methods=["slm", method], **none), out, "pretrain")
    empty = made / "empty"
    empty.mkdir()
    for root in (empty, made / "absent"):
        with pytest.raises(UserError, match="domains_root"):
            pipeline.run(recipe(made, methods=["slm"], domains_root=str(root)), out, "pretrain")
    assert {p.name for p in out.iterdir()} == {".lock", "recipe.yaml"}


def test_a_domain_that_is_not_there_is_told_before_the_corpus_is_read(made, tmp_path):
    out = tmp_path / "run"
    refused(made, out, "nowhere' exists neither under", domains=[str(made / "nowhere")])
    assert {p.name for p in out.iterdir()} <= {".lock", ".locks", "recipe.yaml"}


def test_another_vocabulary_is_one_sentence_before_training(made, tmp_path):
    teacher = model_folder(tmp_path / "teacher")
    own = tokenizer_folder(tmp_path / "own", entries=280)
    d = {"methods": ["slm-d"], "distill": {"teacher": str(teacher)}}
    sentence = "has another vocabulary .*missing here.*tokenizer.path"
    refused(made, tmp_path / "a", sentence, **d, tokenizer={"path": str(own / "tokenizer.json")})
    assert not (tmp_path / "a").exists()
    refused(made, tmp_path / "b", "has another vocabulary", **d)
    assert {p.name.split("-")[0] for p in (tmp_path / "b").iterdir()
            if not p.name.startswith(".")} == {"recipe.yaml", "tokenizer"}
