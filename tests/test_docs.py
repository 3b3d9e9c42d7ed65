"""What the documents say exists: commands, keys, files, recipes."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from planearly import config
from planearly.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="not in a checkout")


def commands(page: Path) -> list[list[str]]:
    """The ``planearly`` commands in a page's blocks, as words."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ |    )(planearly .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines if "..." not in line]


def test_recipe_reference_is_current():
    assert (ROOT / "docs" / "recipes.md").read_text("utf-8") == config.reference() + "\n"


def test_the_pages_show_commands():
    assert len(commands(ROOT / "README.md")) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page):
    group = typer.main.get_command(app)
    for words in commands(page):
        verb = group.commands[words[0]]
        context = verb.make_context(words[0], words[1:], resilient_parsing=False)
        for word in [*(context.params.get("settings") or [])]:
            if "=" in word:
                config.override({}, [word] if "pretrain_tokens=..." not in word else [])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_modules_exist(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    parts = "data|cluster|model|train|specialize|evaluate|plan|stages|report"
    for module in re.findall(rf"`((?:{parts})/\w+\.py)`", text):
        assert (ROOT / "src" / "planearly" / module).exists(), module


def test_makefile_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"`?make (\w+)", (ROOT / "README.md").read_text("utf-8")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
