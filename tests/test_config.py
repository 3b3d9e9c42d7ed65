"""Recipes: every key checked, the nearest named, units read, every recipe of the package sound."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from planearly import config, keys, units
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
    ("context=[", "not valid YAML"),
])
def test_a_bad_setting_is_one_sentence(recipe, setting, sentence):
    with pytest.raises(UserError) as caught:
        config.load(recipe, [setting])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_one_sentence(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: x\n  context: [1\n")
    with pytest.raises(UserError, match=r"broken\.yaml line 2"):
        config.load(broken)
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="key: value"):
        config.load(tmp_path / "list.yaml")
    with pytest.raises(UserError, match=r"the ones that come along are .*demo.*nano"):
        config.load("nanno")


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
    assert 2e6 < flops.parameters(shape) < 8e6


def test_reference_names_every_key():
    text = config.reference()
    for key in ("context", "model.layers", "finetune.optimizer.lr", "importance.max_epochs"):
        assert f"`{key}`" in text


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
])
def test_wrong_units_are_refused(text, function):
    with pytest.raises(UserError):
        function(text)


def test_a_shape_without_shared_keys_is_written_as_it_was():
    """Stages are addressed by it."""
    recipe = config.override({"model": {"heads": 4}})
    plain = Shape.of(recipe.model, 300, 64)
    assert "kv_heads" not in plain.to_dict() and Shape(**plain.to_dict()) == plain
    recipe.model.kv_heads = 4
    assert Shape.of(recipe.model, 300, 64) == plain
    recipe.model.kv_heads = 2
    grouped = Shape.of(recipe.model, 300, 64)
    assert grouped.to_dict()["kv_heads"] == 2 and Shape(**grouped.to_dict()) == grouped
    for wrong in (3, 0, 8):
        with pytest.raises(UserError, match=r"model\.kv_heads' is .*divisor of model\.heads"):
            config.override({"model": {"heads": 4, "kv_heads": wrong}})
