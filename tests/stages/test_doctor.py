"""What `planearly doctor` finds in a run folder, and that it says what to do."""

import contextlib
import itertools
import json
import re
import shutil

import pytest

from planearly import config
from planearly.errors import UserError
from planearly.files import read_json, write_json
from planearly.stages import corpus, doctor, pipeline
from planearly.stages.folder import Run
from planearly.stages.manifest import MANIFEST, facts
from small_runs import call, recipe


@pytest.fixture
def prepared(made, tmp_path):
    """A run up to its rows of text, in a second."""
    out = tmp_path / "run"
    pipeline.run(recipe(made, methods=["slm-nopt"]), out, "prepare")
    return out


def found(out, **options):
    return doctor.examine(out, **options)


def test_a_whole_folder_is_whole_and_what_is_lacking_is_told(prepared, capsys):
    seen = found(prepared)
    assert not seen.findings and seen.whole == len(list(prepared.rglob(MANIFEST))) > 3
    assert [(one.stage, one.why) for one in seen.again] == [
        ("specialize/slm-nopt.law", "it is not made yet")]
    doctor.show(seen)
    assert "specialize/slm-nopt.law would be made" in capsys.readouterr().out


def test_altered_missing_and_interrupted_are_told_with_what_to_do(prepared):
    (generic,), (domain,) = prepared.glob("generic-*"), prepared.glob("domain/law-*")
    tokens = generic / "tokens-00000.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2] + b"xx")
    (domain / "train-excluded.npy").unlink()
    (prepared / "pretrain").mkdir()
    (prepared / "pretrain" / "slm-0123abcd").mkdir()
    seen = found(prepared)
    told = {(one.folder, one.kind): one.told for one in seen.findings}
    assert set(told) == {(generic.name, "damaged"), (f"domain/{domain.name}", "damaged"),
                         ("pretrain/slm-0123abcd", "unfinished")}
    assert f"{generic.name}/tokens-00000.bin is not as it was" in told[generic.name, "damaged"]
    assert f"rm -r {generic}" in told[generic.name, "damaged"]
    assert "train-excluded.npy is missing" in told[f"domain/{domain.name}", "damaged"]
    # sizes alone do not see it
    assert [one.folder for one in found(prepared, deep=False).damaged] == [f"domain/{domain.name}"]
    tokens.write_bytes(content)
    assert [one.folder for one in found(prepared).damaged] == [f"domain/{domain.name}"]


def test_a_changed_manifest_and_an_older_layout_are_told(prepared):
    (generic,), (kept,), (tokens,) = (
        prepared.glob(f"{name}-*") for name in ("generic", "kept", "tokenizer"))
    values = read_json(generic / MANIFEST)
    write_json(generic / MANIFEST, {**values, "settings": {**values["settings"], "context": 99}})
    (kept / MANIFEST).write_text("[1")
    older = read_json(tokens / MANIFEST)
    del older["files"]
    write_json(tokens / MANIFEST, older)
    kinds = {one.folder: one for one in found(prepared).findings}
    assert "was changed" in kinds[generic.name].told and "damaged" in kinds[kept.name].told
    assert kinds[tokens.name].kind == "older" and len(kinds) == 3


@pytest.mark.parametrize("damage", [
    "[]", "[1", "7", '"stage"', '{"stage": "kept", "settings": 3}', "null"])
def test_a_manifest_that_is_none_is_told_by_whoever_reads_it(prepared, made, damage):
    told = r"damaged: remove its folder|is not valid JSON"
    (tokens,) = prepared.glob("tokenizer-*")  # which other stages are made from
    (tokens / MANIFEST).write_text(damage)
    seen = found(prepared)
    assert [one.folder for one in seen.damaged] == [tokens.name]
    assert re.search(told, seen.not_looked)
    with pytest.raises(UserError, match=told):
        facts(tokens)
    with pytest.raises(UserError, match=told):
        pipeline.run(recipe(made, methods=["slm-nopt"]), prepared, "prepare")


def test_why_a_stage_would_be_made_again(prepared, made):
    (prepared / "recipe.yaml").unlink()
    other = config.variant(recipe(made, methods=["slm-nopt"]), {
        "data.held_out": 0.2, "data.generic_eval_tokens": 400})
    with Run(prepared, other).opened() as run:
        shutil.rmtree(corpus.domain(run, "law"))
    told = {one.stage: one.why for one in found(prepared).again}
    assert told == {"domain/law": "1 of this name are there, and the nearest differs in held_out"}


@pytest.mark.parametrize("name", ["la\nw", "[l]aw*"])
def test_a_domain_may_be_called_anything(made, tmp_path, name):
    out = tmp_path / "run"
    (made / "domains" / "law").rename(made / "domains" / name)
    pipeline.run(recipe(made, methods=["slm-nopt"]), out, "prepare")
    assert found(out).whole == len(list(out.rglob(MANIFEST)))
    (stage,) = (out / "domain").iterdir()
    (stage / "train-excluded.npy").unlink()
    assert [one.folder for one in found(out).damaged] == [f"domain/{stage.name}"]
    values = read_json(stage / MANIFEST)
    write_json(stage / MANIFEST, {**values, "settings": {**values["settings"], "held_out": 0.2}})
    stage.rename(stage.with_name(f"{name}-01234567"))
    assert [one.why for one in found(out).again] == [
        "1 of this name are there, and the nearest differs in held_out"]


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder: it has no recipe"):
        doctor.examine(tmp_path)


@pytest.mark.slow
def test_no_file_of_a_run_is_read_without_a_look(made, tmp_path):
    """Each JSON file is a list, of a finished stage or of one that was interrupted: it is written
    anew, or one sentence tells of it."""
    asked, whole, out = recipe(made, methods=["slm-is", "slm-d"], distill={"top_k": 4},
                               finetune={"max_epochs": 1}), tmp_path / "whole", tmp_path / "out"
    pipeline.run(asked, whole, "export")
    places = [path.relative_to(whole) for path in whole.rglob("*.json")]
    read = [place for place in places if not {"export", "evaluate", "model"} & {*place.parts}]
    assert {place.name for place in read} >= {
        ".digests.json", "dataset.json", "embeddings.json", "outcome.json", "stored.json"}
    for place, interrupted in itertools.product(read, (False, True)):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        (out / place).write_text("[1]")
        folder = next((up for up in place.parents if (out / up / MANIFEST).exists()), None)
        if interrupted and folder and place.name != MANIFEST:
            (out / folder / MANIFEST).unlink()
        elif interrupted:
            continue
        found(out, deep=False)
        with contextlib.suppress(UserError):
            pipeline.run(asked, out, "export")


@pytest.mark.slow
def test_the_command_ends_with_1_where_something_is_damaged(prepared):
    seen = json.loads(call("doctor", prepared, "--json").stdout)
    assert seen["whole"] > 3 and seen["again"][0]["stage"] == "specialize/slm-nopt.law"
    next(prepared.glob("kept-*/excluded.npy")).unlink()
    assert "excluded.npy is missing" in call("doctor", prepared, check=1).stdout


@pytest.mark.slow
def test_results_are_held_against_the_stages(made, tmp_path):
    out = tmp_path / "run"
    pipeline.run(config.variant(recipe(made, methods=["slm-nopt"]), {
        "finetune.scratch_epochs": 1, "data.eval_tokens": 200}), out, "export")
    path = out / "results.json"
    results = read_json(path)
    assert found(out).well

    def told(**changed):
        write_json(path, {**results, **changed})
        seen = found(out)
        return [one.told for one in seen.damaged], [one.why for one in seen.again]

    (row,) = results["rows"]
    assert told(rows=[{**row, "ppl_after": 1.5}]) == (
        ["results.json does not say what the evaluations in the folder do: the same command writes "
         "it again"], [])
    assert told(rows=[])[0] and told(rows=[row, row])[0] and told(comparisons=[{}])[0]
    assert told(recipe={**results["recipe"], "seed": 5}) == (
        [], ["it is of other settings than recipe.yaml"])
    del row["bpb_after"]
    assert told(rows=[{**row, "further": 1}]) == ([], [])  # of another version
    for damage in ("[1", "[]", "{}"):
        path.write_text(damage)
        assert [one.told.partition(":")[0] for one in found(out).damaged] == [
            "results.json is damaged"]
    path.unlink()
    assert found(out).well


def test_files_of_a_manifest_that_are_no_list_of_sizes_are_told(prepared):
    (kept,) = prepared.glob("kept-*")
    values = read_json(kept / MANIFEST)
    for files in ([], {"a": 3}, {"a": [1]}, None):
        write_json(kept / MANIFEST, {**values, "files": files})
        assert [one.told.partition(":")[0] for one in found(prepared).damaged] == [
            f"the {MANIFEST} of {kept.name} is damaged"]
