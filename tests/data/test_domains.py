"""Taking domains as split, and splitting them."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly import keys, progress
from planearly.data import documents, domains, inputs
from planearly.data.documents import Problems, Section, split_hash
from planearly.data.domains import domain_names
from planearly.data.inputs import resolve
from planearly.data.readers import read_documents
from planearly.data.text import sections
from planearly.engine.local import Local
from planearly.errors import UserError
from small_documents import DATA, domain_splits, lines

SHARED = Path(__file__).parents[3] / "shared" / "data"


def split_texts(root, entry, seed: int = 0, data: keys.Data = DATA) -> dict[str, list[str]]:
    return {split: [d.text for unit in units for d in read_documents(unit, data, Problems(0.01))]
            for split, units in domain_splits(str(root) if root else None, str(entry), data,
                                              seed).items()}


@pytest.mark.parametrize("names", [
    ("train.jsonl", "valid.jsonl", "test.jsonl"),
    ("train.txt", "validation.txt", "test.txt"),
    ("train/a.jsonl", "dev/a.jsonl", "test/a.jsonl"),
    ("train-00000-of-00001.jsonl", "val.jsonl", "test_set.jsonl"),
    ("Train_data.v2.jsonl", "valid_part_1.jsonl", "test.0007.jsonl"),
])
def test_a_split_folder_is_taken_as_it_is(tmp_path, names):
    for name in (*names, "README.md"):
        path = tmp_path / "law" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines({"text": name}) if "json" in name else name.encode())
    found = split_texts(tmp_path, "law")
    assert found == {"train": [names[0]], "valid": [names[1]], "test": [names[2]]}
    assert split_texts(None, tmp_path / "law") == found
    assert domain_names(str(tmp_path)) == ["law"]


def test_missing_splits_are_split_off_train(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(*({"text": f"t{i}"} for i in range(50))))
    (tmp_path / "test.jsonl").write_bytes(lines({"text": "kept"}))
    found = split_texts(None, tmp_path)
    assert found["test"] == ["kept"] and len(found["valid"]) == 5 and len(found["train"]) == 45


def test_only_a_test_split_is_an_error(tmp_path):
    (tmp_path / "test.jsonl").write_bytes(lines({"text": "x"}))
    with pytest.raises(UserError, match="has a test split but no train split"):
        domain_splits(None, str(tmp_path), DATA, 0)


@pytest.mark.parametrize("names", [
    ("training-manuals.jsonl", "policy-reports.jsonl"), ("train.jsonl", "part2.jsonl"),
    ("docs/a.md", "test/b.md"), ("test.jsonl", "valid.jsonl", "policies.jsonl"),
    ("training-manuals.jsonl", "test-reports.jsonl"),
])
def test_a_name_is_no_split_where_something_else_lies_beside(tmp_path, capsys, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines(*({"text": f"{name} {i}"} for i in range(10))))
    found = split_texts(None, tmp_path)
    if names[0].endswith("md"):
        return  # each a document
    assert sorted(text for part in found.values() for text in part) == sorted(
        f"{name} {i}" for name in names for i in range(10))
    told = capsys.readouterr().err
    assert ("is not taken for a split, as" in told) == ("reports" not in names[1])


def test_what_belongs_to_no_split_is_told(tmp_path, capsys):
    for name in ("train.jsonl", "test.jsonl", "valid.jsonl", "notes.md", "more.jsonl"):
        (tmp_path / name).write_bytes(lines({"text": name}))
    (tmp_path / "images").mkdir()
    assert split_texts(None, tmp_path)["train"] == ["train.jsonl"]
    assert "more.jsonl, notes.md belongs to no split and is left out" in capsys.readouterr().err
    for name in ("o.md", "p.md", "q.md"):
        (tmp_path / name).write_text("left out")
    assert split_texts(None, tmp_path)["train"] == ["train.jsonl"]
    assert "more.jsonl, notes.md, o.md and 2 more belongs to no split" in capsys.readouterr().err


def test_names_that_are_not_unicode_are_told(tmp_path, capsys):
    for name in ("train.jsonl", "caf\udce9.jsonl"):
        (tmp_path / name).write_bytes(lines(*({"text": f"{name!a} {i}"} for i in range(5))))
    (tmp_path / "b\udce9").mkdir()
    (tmp_path / "b\udce9" / "gone.txt").symlink_to("nowhere")
    assert sum(map(len, split_texts(None, tmp_path).values())) == 10
    assert "caf\\udce9.jsonl lies beside" in capsys.readouterr().err
    progress.say("caf\udce9")
    assert capsys.readouterr().err == "caf\\udce9\n"


def test_pages_of_which_one_is_called_test_need_no_word(tmp_path, capsys):
    documents_in(tmp_path, "install.md", "use.md", "test.md")
    assert sum(map(len, split_texts(None, tmp_path).values())) == 3
    assert "not taken" not in capsys.readouterr().err


def test_a_page_called_test_is_not_a_split(tmp_path):
    for name in ("install", "train", "test", "use", "more"):
        (tmp_path / f"{name}.md").write_text(f"about {name}")
    found = split_texts(None, tmp_path)
    assert sorted(sum(found.values(), [])) == sorted(  # noqa: RUF017
        f"about {n}" for n in ("install", "train", "test", "use", "more"))
    assert [len(found[s]) for s in ("train", "valid", "test")] == [3, 1, 1]


@examples(40)
@given(n=st.integers(3, 60), seed=st.integers(0, 5), repeats=st.integers(1, 3))
def test_splits_by_document_are_disjoint_complete_and_never_empty(tmp_path_factory, n, seed,
                                                                 repeats):
    path = tmp_path_factory.mktemp("domain") / "mine.jsonl"
    path.write_bytes(lines(*({"text": f"document {i}"} for i in range(n))) * repeats)
    found = split_texts(None, path, seed)
    sets = {split: set(found[split]) for split in found}
    assert set.union(*sets.values()) == {f"document {i}" for i in range(n)}
    assert sum(len(s) for s in sets.values()) == n  # equal documents stay together
    held = max(1, round(0.1 * n))
    assert len(sets["valid"]) == len(sets["test"]) == held
    assert split_texts(None, path, seed) == found


def test_the_split_depends_on_seed_and_text_not_on_place(tmp_path):
    records = [{"text": f"document {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_bytes(lines(*records))
    (tmp_path / "b.jsonl").write_bytes(lines(*records[::-1]))
    a, b = split_texts(None, tmp_path / "a.jsonl"), split_texts(None, tmp_path / "b.jsonl")
    assert {s: sorted(t) for s, t in a.items()} == {s: sorted(t) for s, t in b.items()}
    assert split_texts(None, tmp_path / "a.jsonl", seed=1)["test"] != a["test"]


def test_a_split_is_the_same_whoever_reads_and_however_files_are_divided(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(lines(
            *({"text": f"{name} {i} " + "x" * 40} for i in range(40)), {"text": "everywhere"}))
    units = resolve([str(tmp_path)])
    hashes = sorted({split_hash(d.text, 7) for unit in units
                     for d in read_documents(unit, DATA, Problems(0.01))})
    monkeypatch.setattr(documents, "_GROUP", 700)  # a file is several shards
    found = []
    for executor in (Local(1), Local(2)):
        monkeypatch.setattr(domains, "_SMALL", 0 if executor.processes > 1 else 100)
        found.append(domains.hold_out(units, ["valid", "test"], "law", DATA, 7, tmp_path / "parts",
                                      executor))
    assert found[0] == found[1] and not (tmp_path / "parts").exists()
    held = round(DATA.held_out * len(hashes))
    assert [found[0][split][0].keep.low for split in ("valid", "test", "train")] == [
        0, hashes[held], hashes[2 * held]]


def test_one_long_document_is_cut_between_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {i}.\nIts second line." for i in range(20)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = split_texts(None, tmp_path / "book.txt")
    assert found == {"train": ["\n\n".join(paragraphs[:16])],
                     "valid": ["\n\n".join(paragraphs[16:18])],
                     "test": ["\n\n".join(paragraphs[18:])]}


@pytest.mark.parametrize("least", [1, 2, 4, 5, 6, 9])
def test_sections_end_at_paragraphs_and_only_of_fewer_at_lines(least):
    paragraphs = [f"the first of {i}\nthe second" for i in range(5)]
    text = "\n " + "\n\n".join(paragraphs) + "\n"
    found = [text[begin:end].strip() for begin, end in pairwise([0, *sections(text, least)])]
    assert found == (paragraphs if least <= 5 else "\n".join(paragraphs).split("\n"))


def test_three_sentences(tmp_path):
    (tmp_path / "lines.txt").write_text("One.\nTwo.\nThree.\n")
    assert split_texts(None, tmp_path / "lines.txt") == {
        "train": ["One."], "valid": ["Two."], "test": ["Three."]}
    (tmp_path / "records.jsonl").write_bytes(lines(*({"text": t} for t in "abc")))
    assert sorted(map(len, split_texts(None, tmp_path / "records.jsonl").values())) == [1, 1, 1]
    (tmp_path / "line.txt").write_text("One. Two. Three.")
    with pytest.raises(UserError, match=r"1 distinct document: .* least 3 documents, or 3 para"):
        domain_splits(None, str(tmp_path / "line.txt"), DATA, 0)
    (tmp_path / "two.txt").write_text("One.\nTwo.\n")
    with pytest.raises(UserError, match=r"1 distinct document: .* least 3 documents, or 3 para"):
        domain_splits(None, str(tmp_path / "two.txt"), DATA, 0)
    (tmp_path / "equal.jsonl").write_bytes(lines(*[{"text": "One.\nTwo.\nThree."}] * 3))
    with pytest.raises(UserError, match="holds 1 distinct document: "):
        domain_splits(None, str(tmp_path / "equal.jsonl"), DATA, 0)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"holds no documents; .*empty"):
        domain_splits(None, str(tmp_path / "empty.txt"), DATA, 0)


@examples(100)
@given(st.lists(st.sampled_from(["a", "bb", "c c", "\n", "\n\n", " \n \n", "d"]), max_size=25),
       st.sampled_from([("train", "valid"), ("train", "valid", "test")]),
       st.floats(0.01, 0.49))
def test_sections_are_in_order_and_lose_no_word(parts, splits, held_out):
    text = "".join(parts).strip()
    taken = [Section(split, splits, held_out).take(text) for split in splits]
    assert " ".join(" ".join(taken).split()) == " ".join(text.split())
    assert all(taken) or (taken[0] == text and not any(taken[1:]))


def test_unknown_domain_and_root(tmp_path):
    with pytest.raises(UserError, match=(
            r"the domain 'lw' exists neither under domains_root \(.*\) nor as a path: check its")):
        domain_splits(str(tmp_path), "lw", DATA, 0)
    with pytest.raises(UserError, match="the domain 'lw' does not exist"):
        domain_splits(None, "lw", DATA, 0)
    with pytest.raises(UserError, match="the domain '~nosuch' does not exist as a path"):
        domain_splits(None, "~nosuch", DATA, 0)
    with pytest.raises(UserError, match="is not a folder"):
        domain_names("~nosuch")
    with pytest.raises(UserError, match="is not a folder"):
        domain_names(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="no subfolders"):
        domain_names(str(tmp_path))


def test_a_domain_that_matches_something_is_told_what_is_wrong_with_it(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("x")
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no file there is"):
        domain_splits(None, f"{tmp_path}/*.html", DATA, 0)
    with pytest.raises(UserError, match="is a link that leads nowhere"):
        domain_splits(None, str(tmp_path / "lost.txt"), DATA, 0)
    with pytest.raises(UserError, match="does not exist as a path"):
        domain_splits(None, f"{tmp_path}/*.jsonl", DATA, 0)

    def unreachable(entry, pinned):
        raise UserError("the hub cannot be reached")

    monkeypatch.setattr(inputs.hub, "resolve", unreachable)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        domain_splits(None, "c4", DATA, 0)


def test_documents_that_are_there_twice_are_told_so(tmp_path):
    one, other = ("\n".join(f"{word} line {i}" for i in range(4)) for word in ("a", "b"))
    place = tmp_path / "law.jsonl"
    place.write_bytes(lines({"text": one}, {"text": other}, {"text": one}))
    with pytest.raises(UserError, match=r"2 distinct documents: .*, or each of them once, which"):
        domain_splits(None, str(place), DATA, 0)
    place.write_bytes(lines({"text": one}, {"text": other}))
    assert all(split_texts(None, place).values())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not on this machine")
def test_real_domains():
    names = domain_names(str(SHARED / "domains"))
    assert len(names) == 9
    splits = domain_splits(str(SHARED / "domains"), "europarl", DATA, 0)
    problems = Problems(0.01)
    counts = {split: sum(1 for unit in units for _ in read_documents(unit, DATA, problems))
              for split, units in splits.items()}
    assert counts == {"train": 450, "valid": 65, "test": 52} and problems.bad == 0


def test_no_more_documents_are_held_out_than_asked_for(tmp_path):
    texts = [f"document {i} of a domain that comes in one piece" for i in range(60)]
    (tmp_path / "d.jsonl").write_bytes(lines(*({"text": text} for text in texts)))
    few = dataclasses.replace(DATA, held_out=0.2, held_out_documents=3)
    parts = split_texts(None, tmp_path / "d.jsonl", data=few)
    assert [len(parts[split]) for split in ("train", "valid", "test")] == [54, 3, 3]
    share = split_texts(None, tmp_path / "d.jsonl", data=dataclasses.replace(few,
                                                                           held_out_documents=None))
    assert [len(share[split]) for split in ("train", "valid", "test")] == [36, 12, 12]


@pytest.mark.parametrize(("n", "sizes"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (5, [1, 2, 2]),
                                          (10, [2, 4, 4])])
def test_something_is_left_to_train_on(tmp_path, n, sizes):
    (tmp_path / "d.jsonl").write_bytes(lines(*({"text": f"document {i}"} for i in range(n))))
    parts = split_texts(None, tmp_path / "d.jsonl", data=dataclasses.replace(DATA, held_out=0.4))
    assert [len(parts[split]) for split in ("train", "valid", "test")] == sizes


def documents_in(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(lines(*({"text": f"{name} {i}"} for i in range(9)))
                                    if "json" in name else name.encode() * 9)


def test_splits_in_a_sole_subfolder_are_taken(tmp_path):
    documents_in(tmp_path, "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl",
                 "README.md")
    found = split_texts(None, tmp_path)
    assert len(found["test"]) == 9 and all("test-" in text for text in found["test"])
    assert all("train-" in text for text in found["train"] + found["valid"])


@pytest.mark.parametrize("names", [
    ("train.txt", "test.txt", "valid.txt", "LICENSE.txt"), ("law_train.jsonl", "law_test.jsonl"),
    ("la\nw_train.jsonl", "la\nw_test.jsonl")])
def test_names_that_look_like_splits_and_are_not_taken_are_said(tmp_path, capsys, names):
    documents_in(tmp_path, *names)
    split_texts(None, tmp_path)
    assert "not taken for splits" in capsys.readouterr().err
