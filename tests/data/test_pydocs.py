from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest

from planearly.data import pydocs
from planearly.errors import UserError

LONG = "Numbers {i} of the estimator are described here with care, parameter by parameter. "


def prose(i: object, times: int = 4) -> str:
    return (LONG * times).replace("{i}", f"number {i}").strip()


@pytest.fixture
def roots(tmp_path: Path) -> list[tuple[str | None, Path]]:
    """A small installation: a standard library and a site-packages with a domain, 'big'."""
    stdlib, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    files = {stdlib / "json" / "__init__.py": f'"""{prose("json")}"""\n',
             stdlib / "test" / "test_json.py": f'"""{prose("a test")}"""\n',
             site / "single.py": f'"""{prose("single")}"""\n',
             site / "single-1.0.dist-info" / "notes.txt": prose("metadata", 20),
             site / "kin" / "broken.py": f'"""{prose("broken")}"""\nthis does not parse\n',
             site / "kin" / "guide.rst": prose("guide", 20),
             site / "kin" / "LICENSE.txt": prose("licence", 20),
             site / "kin" / "table.txt": "1.0 2.0 3.0 4.0 5.0 6.0\n" * 200,
             site / "kin" / "shared.py": f'def same():\n    """{prose(3)}"""\n'}
    for i in range(60):
        files[site / "big" / f"part{i}.py"] = (f'def f{i}(x, *, y=1):\n    """{prose(i)}"""\n'
                                                   f'class C{i}:\n    """{prose(-i - 1)}"""\n')
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [("python", stdlib), (None, site)]


def records(path: Path) -> Iterator[dict[str, str]]:
    for line in pyarrow.CompressedInputStream(str(path), "zstd").read().splitlines():
        yield json.loads(line)


def test_build_splits_the_domain_by_file_and_keeps_it_out_of_the_rest(roots, tmp_path):
    facts = pydocs.build(tmp_path / "out", "big", roots, workers=1)
    shards = sorted((tmp_path / "out" / "generic").iterdir())
    generic = {record["id"]: record for shard in shards for record in records(shard)}
    assert set(generic) == {"python/json/__init__.py#0", "single.py#0", "kin/guide.rst#0"}
    assert generic["single.py#0"]["source"] == "single"
    assert generic["python/json/__init__.py#0"]["source"] == "python"
    domain = tmp_path / "out" / "domain" / "big"
    split = {name: [record["id"] for record in records(domain / f"{name}.jsonl.zst")]
             for name in ("train", "valid", "test")}
    ids = [id for part in split.values() for id in part]
    assert sorted(ids) == sorted(f"big/part{i}.py#{n}" for i in range(60)
                                 for n in (0, 1))
    files = {name: {id.split("#")[0] for id in part} for name, part in split.items()}
    assert sum(len(part) for part in files.values()) == 60  # no file is in two splits
    assert 40 <= len(files["train"]) <= 56
    assert facts["documents"] == {"generic": 3, **{name: len(ids) for name, ids in split.items()}}
    assert facts["duplicates"] == 1  # kin/shared.py repeats a docstring of the domain
    assert facts["unreadable"] == 1
    text = sum(len(record["text"].encode()) for record in generic.values())
    assert facts["bytes"]["generic"] == text


def test_build_is_the_same_byte_for_byte_whatever_the_workers(roots, tmp_path):
    pydocs.build(tmp_path / "one", "big", roots, workers=1)
    pydocs.build(tmp_path / "two", "big", roots[::-1], workers=2)
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(names) == 3 + pydocs.SHARDS + 1
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def read(tmp_path: Path, code: str, id: str = "pkg/mod.py") -> list[list[pydocs.Section]] | None:
    (tmp_path / "mod.py").write_text(code, "utf-8")
    return pydocs.read_source(pydocs.Source(str(tmp_path / "mod.py"), "pkg", id))


def test_headings_carry_the_qualified_name_and_signature(tmp_path):
    text = prose(1)
    module, sections = read(tmp_path, f'"""{text}"""\nclass A(B, list):\n    """{text}2"""\n'
                              f'    async def run(self, x: int = 1, *rest):\n'
                              f'        """{text}3"""\n'
                              f'        def inner():\n            """{text}4"""\n')
    assert [section.heading for section in [*module, *sections]] == [
        "module pkg.mod", "class pkg.mod.A(B, list)", "pkg.mod.A.run(self, x: int=1, *rest)",
        "pkg.mod.A.run.inner()"]
    assert sections[0].text == f"{text}2"


def test_documentation_of_compiled_functions_is_read_from_the_calls_that_attach_it(tmp_path):
    body = "\\n\\n" + prose(1)
    documents = read(tmp_path, f'add_docstr(torch.abs, """abs(input){body}""" + "\\nEnd")\n'
                              f'add_newdoc("numpy", "ndarray", ("flat", "{body}"))\n'
                              f'print("{body}")\n')
    assert [section.heading for section, in documents] == ["torch.abs", "numpy.ndarray.flat"]
    assert documents[0][0].text.startswith("abs(input)") and documents[0][0].text.endswith("End")


def test_docstrings_are_cleaned_and_short_ones_left_out(tmp_path):
    text = prose(1)
    documents = read(tmp_path, f'def f():\n    """First.   \n\n\n\n\n'
                              f'    \\ud800\\x07{text}\n    """\n'
                              f'def g():\n    """{"x" * (pydocs.SHORTEST - 1)}"""\n'
                              f'def h():\n    """{"y" * pydocs.SHORTEST}"""\n')
    assert [section.text for section, in documents] == [
        f"First.\n\n? {text}", "y" * pydocs.SHORTEST]


@pytest.mark.parametrize(("text", "many"), [
    (prose(1, 20), 1), (prose(1, 20).replace(". ", ".\n"), 1), ("two words\n" * 200, 0),
    ("1.0 2.0 3.0 4.0 5.0 6.0\n" * 200, 0), (prose(1, 4), 0)])
def test_files_of_sentences_are_read_and_lists_and_tables_are_not(tmp_path, text, many):
    (tmp_path / "guide.txt").write_text(text)
    found = pydocs.read_source(pydocs.Source(str(tmp_path / "guide.txt"), "pkg", "pkg/guide.txt"))
    assert found is not None and len(found) == many


def test_a_file_that_does_not_parse_is_none(tmp_path):
    assert read(tmp_path, '"""x""" (') is None
    assert pydocs.read_source(pydocs.Source(str(tmp_path / "gone.py"), "pkg", "gone.py")) is None


def test_a_domain_that_is_absent_or_tiny_is_refused_and_nothing_written(roots, tmp_path):
    for name in ("absent", "single"):
        with pytest.raises(UserError, match=f"'{name}' has"):
            pydocs.build(tmp_path / "out", name, roots, workers=1)
    with pytest.raises(UserError, match="none of scipy"):
        pydocs.build(tmp_path / "out", None, roots, workers=1)
    with pytest.raises(UserError, match="no Python sources"):
        pydocs.build(tmp_path / "out", None, [(None, tmp_path / "nowhere")], workers=1)
    assert not (tmp_path / "out").exists()


def test_the_first_package_with_enough_documentation_is_held_out():
    assert pydocs._choose(Counter(scipy=999_999, sklearn=1_000_001, torch=5_000_000)) == "sklearn"


def test_the_running_interpreter_has_the_default_domain():
    ids = {source.id for source in pydocs.find_sources(pydocs.installation())}
    assert {"python/json/__init__.py", "scipy/fft/_basic.py", "torch/_torch_docs.py"} <= ids
    assert not any("/tests/" in id or id.startswith("planearly/") for id in ids)
