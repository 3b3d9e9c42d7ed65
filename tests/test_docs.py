"""What the documents say exists: commands, keys, files, recipes."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main
import yaml

import planearly
from planearly import config, methods
from planearly.cli import app, main

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "planearly"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md",
         *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="not in a checkout")


def commands(page: Path) -> list[list[str]]:
    """The ``planearly`` commands in a page's blocks, as words."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ |    )(planearly .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines if "..." not in line]


def test_recipe_reference_is_current():
    assert (ROOT / "docs" / "recipes.md").read_text("utf-8") == config.reference() + "\n"


def test_the_reference_names_the_words_that_a_key_takes():
    rows = {line.split("`")[1]: line for line in config.reference().splitlines()
            if line.startswith("| `")}
    for key, words in (("expert", "`lowest-loss`, `best-tuned`, `blend`"), ("track", "`wandb`"),
                       ("tokenizer.kind", "`bpe`, `unigram`"), ("distill.on", "`importance`"),
                       ("finetune.optimizer.schedule", "`cosine`")):
        assert "one of `" in rows[key] and words in rows[key]
    assert "one of" not in rows["context"]


def test_the_pages_show_commands():
    assert len(commands(ROOT / "README.md")) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page):
    group = typer.main.get_command(app)
    for words in commands(page):
        verb = group.commands[words[0]]
        context = verb.make_context(words[0], words[1:], resilient_parsing=False)
        config.override({}, [word for word in context.params.get("settings") or []
                             if "=" in word and "pretrain_tokens=..." not in word])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_modules_exist(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    rooms = "|".join(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    for module in re.findall(rf"`((?:{rooms})/\w+\.py)`", text):
        assert (PACKAGE / module).exists(), module


def test_makefile_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    for target in re.findall(r"`?make (?:TORCH=\w+ )?(\w+)", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page, head", [("README.md", "| in `methods=[...]` |"),
                                        ("docs/method.md", "| method | before")])
def test_every_method_has_its_row(page, head):
    text = (ROOT / page).read_text("utf-8")
    table = text[text.index(head):].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:]
             for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(named) == sorted(methods.TABLE)


def test_the_command_tells_every_method(monkeypatch, capsys):
    monkeypatch.setitem(methods.TABLE, "slm-new", methods.Method("slm-new", "SLM-new", "a new one"))
    main(["methods"])
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()] == list(methods.TABLE)
    assert "slm-new    a new one\n" in told


def test_the_map_of_the_code_names_every_room():
    text = (ROOT / "docs" / "code.md").read_text("utf-8").partition("##")[0]
    rooms = {path.parent.name + "/" for path in PACKAGE.glob("*/__init__.py")}
    rooms |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    named = {name for row in text.splitlines() if row.startswith("| `")
             for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert named == rooms


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert project["version"] == planearly.__version__ == cited["version"]
    assert f"## {planearly.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_site_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f" {page.name}\n" in text, page.name


def test_comments_name_paragraphs_of_the_decisions_that_exist():
    titles = re.findall(r"^\*\*(.+?)\*\*", (ROOT / "docs" / "decisions.md").read_text("utf-8"),
                        re.MULTILINE | re.DOTALL)
    named = [" ".join(found.split()) for path in PACKAGE.rglob("*.py") for found in
             re.findall(r'docs/decisions\.md,\s+"([^"]+)"', path.read_text("utf-8"))]
    assert len(named) >= 8
    assert [one for one in named if not any(title.startswith(one) for title in titles)] == []
