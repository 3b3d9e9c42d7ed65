"""Corpora by name, read from repositories of the same layout."""

from __future__ import annotations

import dataclasses

import pytest

from planearly.data import corpora, inputs
from planearly.data.documents import Problems
from planearly.data.inputs import resolve
from planearly.data.readers import read_documents
from planearly.errors import UserError
from small_documents import DATA
from small_hub import corpora as repositories

pytest.importorskip("datasets")


def texts(name):
    return [[f"{name} {file} {n}" for n in range(2)] for file in range(2)]


@pytest.fixture
def local(tmp_path, monkeypatch):
    """The table with entries that lie in a folder instead of on the hub."""
    repositories(tmp_path / "hub", texts)
    monkeypatch.chdir(tmp_path)
    inputs._tell.cache_clear()
    for name, corpus in corpora.TABLE.items():
        entry = corpus.entry.replace("hf://", f"hf://{tmp_path}/hub/")
        monkeypatch.setitem(corpora.TABLE, name, dataclasses.replace(corpus, entry=entry))


@pytest.mark.parametrize("name", corpora.TABLE)
def test_a_corpus_by_name_is_its_training_split(local, name, capsys):
    units = resolve([name])
    assert len(units) == 2 and corpora.TABLE[name].licence in capsys.readouterr().err
    found = [document for unit in units for document in read_documents(unit, DATA, Problems(0))]
    assert [d.text for d in found] == [text for file in texts(name) for text in file]
    repository = corpora.TABLE[name].entry.partition("/hub/")[2].split("/")[1].split(":")[0]
    assert [d.source for d in found] == (["FreeLaw", "ArXiv"] * 2 if name == "pile"
                                         else [repository] * 4)
    some = sum(len(d.text) for d in found)
    assert some < sum(unit.text_bytes for unit in units) < 500 * some


def test_what_lies_here_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "a.txt").write_text("mine")
    assert [unit.path for unit in resolve(["c4"])] == ["c4/a.txt"]
    with pytest.raises(UserError, match="did you mean the corpus 'fineweb-edu'"):
        resolve(["fineweb_edu"])
