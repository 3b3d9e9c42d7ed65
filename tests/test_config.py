"""Recipes: every key checked, the nearest named, units read, every recipe of the package sound."""

import contextlib
import dataclasses
import json
import re
import typing
from dataclasses import FrozenInstanceError, replace

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from examples import examples
from planearly import checks, config, keys, units
from planearly.errors import UserError
from planearly.model import flops
from planearly.model.transformer import Shape


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmodel: {layers: 2}\n")
    return path


def test_overrides_reach_every_depth(recipe):
    made = config.load(recipe, ["pretrain_tokens=10M", "finetune.optimizer.preset=paper",
                                "domains=[a,b]", "methods=slm", "spec_tokens=null",
                                "pretrain.compile=no", "cluster.k=[4, 8]"])
    assert made.pretrain_tokens == 10_000_000
    assert made.finetune.optimizer.preset == "paper"
    assert made.domains == ["a", "b"] and made.methods == ["slm"]
    assert made.spec_tokens is None and made.pretrain.compile == "no"
    assert made.model.layers == 2 and made.cluster.k == [4, 8]


@pytest.mark.parametrize("changes", [
    {"finetune": {"patience": 9, "optimizer": {"lr": 0.25}}},
    {"finetune": {"patience": 9}, "finetune.optimizer": {"lr": 0.25}}])
def test_a_section_changes_the_keys_that_it_names_alone(changes):
    begun = config.load("nano", ["finetune.max_epochs=3", "finetune.optimizer.warmup_steps=2"])
    asked = replace(begun.finetune, patience=9, optimizer=replace(
        begun.finetune.optimizer, lr=0.25))
    assert config.variant(begun, changes) == replace(begun, finetune=asked)
    assert config.override(begun.to_dict(), changes=changes) == replace(begun, finetune=asked)
    for section in ({"patienc": 9}, {"optimizer": 3}, 9):
        with pytest.raises(UserError, match=r"'finetune"):
            config.variant(begun, {"finetune": section})


@pytest.mark.parametrize(("setting", "sentence"), [
    ("contxt=3", "unknown recipe key 'contxt'; did you mean 'context'"),
    ("model.layer=3", "unknown recipe key 'model.layer'; did you mean 'model.layers'"),
    ("finetune=3", "'finetune' is a section"),
    ("finetune.optimizer.preset=sgd", "choose from modern, adamw, paper"),
    ("pretrain_tokens=50GB", "should be a count such as"),
    ("pretrain_tokens=-5", "not negative"),
    ("pretrain_tokens=many", "is not a number"),
    ("context=4", "between 8 and"),
    ("tokenizer.vocab_size=100", "at least 260"),
    ("model.heads=7", "a divisor of model.d_model"),
    ("importance.k=5", "one of cluster.k"),
    ("pretrain.batch_tokens=100", "at least one window"),
    ("data.held_out=0.9", "between 0 and 0.5"),
    ("finetune.replay_share=1", "below 1"),
    ("nonsense", "key=value"),
    ("context=[", "not valid YAML"), ("context=1.5", "should be a whole number"),
    ("cluster.k=16,64", "a list is written in brackets"), ("cluster.k=[]", "a list of numbers"),
    ("domains=[a,,b]", "an item is empty"), ("domains=['a, b]", "a quote is not closed"),
    ("domains=[[a, b]", "a bracket is not closed"), ("extends=nano", "at the top of a recipe file"),
    ("name=../../x", "the name of a folder"), ("pretrain.compile=maybe", "choose from auto, yes"),
    ("cluster.nested=maybe", "should be true or false"), ("lora.alpha=inf", "finite"),
    ("projected.deviation=1", "at least 0 and below 1"), ("projected.rank=0", "between 1 and"),
    ("projected.embedding=1", "at least 2, for experts to differ by"),
    ("distill.temperature=0", "above 0"), ("distill.top_k=0", "between 1 and"),
    ("distill={data_weight: 0, teacher_weight: 0}", "positive where distill.data_weight is 0"),
    ("lora.rank=0", "between 1 and"), ("lora.alpha=1e999", "finite"),
    ("finetune.patience=0", "between 1 and"),
    ("pretrain.optimizer.lr=-1", "above 0"), ("tokenizer={a: {b: c}}", "'tokenizer.a'"),
    ("start=https://hf.co/a/b", "start' is https://hf.co/a/b; it must be on this machine or in a"),
    ("cluster.embedder=s3://a/b", "it must be on this machine"),
    ("domains_root=hf://a/b", "'domains_root' is hf://a/b; it must be on this machine or in a s"),
    ("study.suite=", "recipe key 'study.suite' is empty; choose from paper, split"),
    ("seed=", "recipe key 'seed' is empty; it should be a whole number"),
    ("=3", "unknown recipe key ''"), ("model.layers.x=3", "'layers' is not a section"),
])
def test_a_bad_setting_is_one_sentence(recipe, setting, sentence):
    with pytest.raises(UserError) as caught:
        config.load(recipe, [setting])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "sentence"), [
    (b"name: x\n  context: [1\n", "a.yaml line 2 is not valid YAML"),
    (b"- a\n", "key: value"), (b"just words\n", "key: value"), (b"", "a.yaml is empty"),
    (b"# nothing\n", "a.yaml is empty"), (b"name: a\n---\nname: b\n", "line 2 is not valid YAML"),
    ("name: a\n".encode("utf-16"), "UTF-16"), ("name: a\n".encode("utf-16-le"), "UTF-16"),
    (b"name: a\nmethods: [caf\xe9]\n", "a.yaml line 2 is not UTF-8 (byte 0xe9)"),
    (b"name: a\x07\n", "line 1 holds a character that no text has (U+0007)"),
    (b"name: a\nmodel:\n\tlayers: 2\n", "line 3 is not valid YAML: a tab"),
    (b"name: a\nseed: 1\nname: b\n", "a.yaml line 3 has the key 'name' a second time"),
    (b"? [a, b]\n: 1\n", "a key is a word"), (b"1: 2\n", "a.yaml line 1: unknown recipe key '1'"),
    (b"name: x\ncontxt: 3\n", "line 2: unknown recipe key 'contxt'; did you mean 'context'"),
    (b"model:\n  layers: 2\n  d_fff: 3\n", "line 3: unknown recipe key 'model.d_fff'"),
    (b"model:\n  layers: two\n", "a.yaml line 2: recipe key 'model.layers': 'two' is not"),
    (b"\nseed: 1\ncontext: 4\n", "a.yaml line 3: recipe key 'context' is 4; it must be between"),
    (b"lora:\n  alpha: .nan\n", "line 2: recipe key 'lora.alpha' is '.nan'; it should be a number"),
    (b"layers: 2\n", "unknown recipe key 'layers'; did you mean 'model.layers'"),
    (b"name: !!python/object:os.system x\n", "has the tag"), (b"name: !x y\n", "has the tag"),
    (b"name: [a, b]\n", "recipe key 'name' is"), (b"model: 3\n", "line 1: 'model' is a section"),
    (b"domains: &a [*a]\n", "nested deeper"), (b"domains: [" + b"[" * 9000, "nested deeper"),
    (b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9))
        for i in range(9)), "aliases multiply it"),
    (b"x" * (5 << 20), "larger than 4 MB"),
    (b"extends:\n", "line 1: 'extends' names no recipe"),
    (b"extends: a.yaml\n", "line 1 extends 'a.yaml', which leads back to itself"),
    (b"extends: gone.yaml\n", "line 1 extends 'gone.yaml', and there is no"),
    (b"extends: b.yaml\n", "b.yaml line 1 extends 'a.yaml', which leads back to itself"),
])
def test_a_bad_file_is_one_sentence(tmp_path, content, sentence):
    (tmp_path / "a.yaml").write_bytes(content)
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError) as caught:
        config.load(tmp_path / "a.yaml")
    said = str(caught.value)
    assert sentence in said and "a.yaml" in said and "\n" not in said and len(said) < 700


def test_what_is_no_recipe_is_told(tmp_path):
    with pytest.raises(UserError, match=r"did you mean 'nano'\? the ones that .* are best, demo"):
        config.load("nanno")
    for word in ("x" * 5000, "a\0b", str(tmp_path), str(tmp_path / "demo.yaml")):
        with pytest.raises(UserError):
            config.load(word)


def test_a_recipe_may_extend_one_of_the_package(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfextends: nano\nname: mine\n")
    assert config.load(tmp_path / "mine.yaml").model == config.load("nano").model


TYPED = ["1.10", "2024-13-01", "2024-01-13", "no", "007", "12:30", "*main.jsonl", "a*b", "**/x",
         "1e3", "0x10", "~x", "null", "=", "<<", "&x", "!x", "%x", "@x", "`x", "|", "-", "a: b",
         "a #b", "dir/[ab].jsonl", "a?.txt", "hf://a/b:c", "o'brien.txt", "+1", ".5", "1_0", "yes"]


@pytest.mark.parametrize("text", TYPED)
def test_texts_stay_as_typed_on_the_command_line(text):
    made = config.override({}, [f"domains=[{text}, x ,'{text.replace(chr(39), chr(39) * 2)}']"])
    assert made.domains == [text, "x", text]
    assert config.override({}, [f"data.text_field={text}"]).data.text_field == text
    if text != "null":
        assert config.override({}, [f"start={text}"]).start == text
        assert config.override({}, [f"domains={text}"]).domains == [text]


@pytest.mark.parametrize("text", [t for t in TYPED if t not in (
    "-", "a: b", "a #b", "dir/[ab].jsonl", "a?.txt", "!x", "&x", "%x", "@x", "`x", "|")])
def test_texts_stay_as_typed_in_a_file(tmp_path, text):
    (tmp_path / "a.yaml").write_text(
        f"domains: [{text}, x]\ndata: {{text_field: {text}}}\ngeneric:\n- {text}\n"
        f"study: {{grid: [{{methods: [slm], domains: [{text}], over: {{cluster.embedder: [{text}]}}"
        "}]}\n")
    made = config.load(tmp_path / "a.yaml")
    assert made.domains == [text, "x"] and made.data.text_field == text and made.generic == [text]
    assert made.study.grid[0].domains == [text]
    assert made.study.grid[0].over == {"cluster.embedder": [text]}
    assert all(type(one) is str for one in (made.data.text_field, *made.domains))


def test_a_file_of_json_may_escape_any_character(tmp_path):
    text = "emoji \U0001f600 and 船"
    for name in ("recipe.yaml", "recipe.json"):
        (tmp_path / name).write_text(json.dumps({"domains": [text]}))
        assert config.load(tmp_path / name).domains == [text]
    assert config.load("nano", ['domains=["\\ud83d\\ude00"]']).domains == ["\U0001f600"]
    with pytest.raises(UserError, match="no text has"):
        config.load("nano", ['domains=["\\ud83d"]'])


def test_anchors_of_a_file_stand_for_what_they_name(tmp_path):
    (tmp_path / "a.yaml").write_text("domains: &two [a, b]\ngeneric: *two\nmodel: &m {layers: 3}\n"
                                     "large: {<<: *m, heads: 2}\n")
    made = config.load(tmp_path / "a.yaml")
    assert made.generic == ["a", "b"] and made.large.layers == 3 and made.large.heads == 2


def test_values_of_a_grid_keep_their_kinds(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "study: {grid: [{methods: [slm], over: {pretrain_tokens: [12M, 500], lora.lr_factor: [0.5],"
        " projected.tune_vector: [true], importance.k: [null], start: [null, no],"
        " projected.matrices: [[up, no], gate]}}]}\n")
    assert config.load(tmp_path / "a.yaml").study.grid[0].over == {
        "pretrain_tokens": ["12M", 500], "lora.lr_factor": [0.5], "projected.tune_vector": [True],
        "importance.k": [None], "start": [None, "no"],
        "projected.matrices": [["up", "no"], ["gate"]]}


def test_extends_merges_sections(tmp_path, recipe):
    child = tmp_path / "child.yaml"
    child.write_text("extends: mine.yaml\nmodel: {d_ff: 99}\n")
    made = config.load(child)
    assert (made.model.layers, made.model.d_ff, made.name) == (2, 99, "mine")


RECIPES = sorted(p.stem for p in config.recipes_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_package_loads(name):
    made = config.load(name)
    again = config.build(keys.Recipe, yaml.safe_load(yaml.safe_dump(made.to_dict())), "")
    assert again == made
    assert made.name == name


@pytest.mark.parametrize(("name", "large", "target"), [
    ("slm-126m", False, 126e6), ("llm-771m", True, 771e6)])
def test_paper_shapes_have_the_paper_size(name, large, target):
    made = config.load(name)
    shape = Shape.of(made.large if large else made.model, made.tokenizer.vocab_size, made.context)
    assert flops.parameters(shape) == pytest.approx(target, rel=0.04)  # the paper: sizes rounded


@pytest.mark.parametrize("name", ["demo", "nano"])
def test_small_recipes_are_small(name):
    made = config.load(name)
    shape = Shape.of(made.model, made.tokenizer.vocab_size, made.context)
    assert 1e6 < flops.parameters(shape) < 8e6


def test_a_typed_value_is_not_blamed_on_the_recipe_file():
    with pytest.raises(UserError, match=r"^recipe key 'pretrain\.shard' is 'maybe'"):
        config.load("demo", ["pretrain.shard=maybe"])


def test_reference_names_every_key():
    text = config.reference()
    for key in ("context", "model.layers", "finetune.optimizer.lr", "importance.max_epochs"):
        assert f"`{key}`" in text


@examples(100)
@given(st.integers(0, 10**15))
def test_counts_survive_printing(n):
    assert units.count(str(n)) == n
    assert units.count(f"{n:_}") == n


@pytest.mark.parametrize(("text", "function", "value"), [
    ("126M", units.count, 126_000_000), ("1.5B", units.count, 1_500_000_000),
    ("8k", units.count, 8000), ("50GB", units.size, 50 * 10**9),
    ("1GiB", units.size, 2**30), ("2h", units.hours, 2.0), ("90min", units.hours, 1.5),
    ("3d", units.hours, 72.0), ("7", units.hours, 7.0),
])
def test_units(text, function, value):
    assert function(text) == value


@pytest.mark.parametrize(("text", "function"), [
    ("2h", units.count), ("126M", units.size), ("50GB", units.hours), ("-1", units.count),
    ("", units.count), ("1e999", units.hours), ("M126", units.count),
    ("1e300T", units.count), ("1e300TB", units.size), ("1e308d", units.hours),
])
def test_wrong_units_are_refused(text, function):
    with pytest.raises(UserError):
        function(text)


@pytest.mark.parametrize("place", ["contxt", "to_dict", "name.upper", "model.layers.real", ""])
def test_what_is_no_key_has_no_value(place):
    with pytest.raises(UserError, match="is no recipe key"):
        config.value_of(config.override({}), place)
    assert config.value_of(config.override({}), "finetune.optimizer.preset") == "modern"


def test_a_recipe_is_not_edited_in_place():
    recipe = config.override({})
    with pytest.raises(FrozenInstanceError):
        recipe.seed = 1
    with pytest.raises(FrozenInstanceError):
        recipe.finetune.optimizer.lr = 1.0


def test_a_shape_without_shared_keys_is_written_as_it_was():
    """Stages are addressed by it."""
    recipe = config.override({"model": {"heads": 4}})
    plain = Shape.of(recipe.model, 300, 64)
    assert "kv_heads" not in plain.to_dict() and Shape(**plain.to_dict()) == plain
    assert Shape.of(replace(recipe.model, kv_heads=4), 300, 64) == plain
    grouped = Shape.of(replace(recipe.model, kv_heads=2), 300, 64)
    assert grouped.to_dict()["kv_heads"] == 2 and Shape(**grouped.to_dict()) == grouped
    for wrong in (3, 8):
        with pytest.raises(UserError, match=r"model\.kv_heads' is .*divisor of model\.heads"):
            config.override({"model": {"heads": 4, "kv_heads": wrong}})


def numeric(kind=keys.Recipe, where=""):
    for field, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from numeric(hint, f"{where}{field}.")
        elif re.search(r"\b(int|float)\b", str(hint)) and "Block" not in str(hint):
            yield kind, field


def test_every_number_has_a_range():
    """A key that may hold any number is one that nobody thought about: see checks.RANGES."""
    assert [(kind.__name__, field) for kind, field in numeric()
            if checks.range_of(kind, field) is None] == []
    for section, ranges in checks.RANGES.items():
        assert ranges.keys() <= typing.get_type_hints(section).keys()
    default = keys.Recipe()
    checks.check(default)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["nan", "-inf", "1e999", "-1", "0", "10" * 40, "1.5", "9" * 400, "", "\0",
                       "\ud800", "[", "null", "16,64", "5GB", 10**400, -0.0, 1e-320, b"bytes"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner,
                                                               max_size=2), max_leaves=6)


@examples(300)
@given(st.sampled_from(list(config.places())), ODD)
@example("seed", "\n")
@example("name", {"a\x1b[2J": 1})
def test_any_value_of_any_key_makes_a_recipe_or_a_sentence(place, value):
    values: dict = {}
    config._put(values, place, value)
    try:
        made = config.override(values)
    except UserError as error:
        assert "\n" not in str(error)
        assert place.rpartition(".")[2] in str(error) or place.partition(".")[0] in str(error)
    else:
        checks.check(made)
        json.dumps(made.to_dict(), allow_nan=False).encode()
        assert config.override(made.to_dict()) == made


@examples(300)
@given(st.sampled_from(list(config.places())),
       st.text(max_size=12) | st.text("[]{},:'\"*&!#-~ .\\09anx", max_size=12)
       | st.sampled_from(TYPED))
def test_anything_typed_makes_a_recipe_or_a_sentence(place, text):
    try:
        made = config.override({}, [f"{place}={text}"])
    except UserError as error:
        assert len(str(error)) < 2000
    else:
        checks.check(made)


@examples(200)
@given(st.binary(max_size=60) | st.text("[]{},:'\"*&!#-~ .\\\n\t09anx?|>%@`<=", max_size=40).map(
    str.encode))
def test_any_file_makes_a_recipe_or_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        config.load(path)
