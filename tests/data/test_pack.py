"""Packing windows into rows."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly import files
from planearly.data import pack
from planearly.data.dataset import DOCUMENT, WINDOW, TokenDataset
from planearly.data.pack import Rows, pack_rows
from planearly.engine.local import Local
from planearly.errors import UserError


@st.composite
def packings(draw):
    context = draw(st.integers(1, 40))
    n_groups = draw(st.integers(1, 5))
    n = draw(st.integers(0, 80))
    lengths = draw(st.lists(st.integers(1, context), min_size=n, max_size=n))
    groups = draw(st.lists(st.integers(-1, n_groups - 1), min_size=n, max_size=n))
    return np.array(lengths, np.int64), np.array(groups, np.int64), n_groups, context


@examples(200)
@given(packings(), st.integers(0, 3))
def test_every_window_once_in_a_row_of_its_group(packing, seed):
    lengths, groups, n_groups, context = packing
    rows = pack_rows(lengths, groups, n_groups, context, seed)
    assert sorted(rows.windows) == np.flatnonzero(groups >= 0).tolist()
    assert len(rows.group_offsets) == n_groups + 1
    assert rows.group_offsets[0] == 0 and rows.group_offsets[-1] == len(rows)
    assert rows.row_offsets[0] == 0 and rows.row_offsets[-1] == len(rows.windows)
    for group in range(n_groups):
        for row in range(rows.group_offsets[group], rows.group_offsets[group + 1]):
            windows = rows.row(row)
            assert len(windows) > 0
            assert (groups[windows] == group).all()
            assert lengths[windows].sum() <= context
        # Two rows that would fit into one another are never left apart (any-fit property).
        used = sorted(lengths[rows.row(r)].sum() for r in
                      range(rows.group_offsets[group], rows.group_offsets[group + 1]))
        assert len(used) < 2 or used[0] + used[1] > context
    if len(rows):
        assert rows.fill == lengths[groups >= 0].sum() / (len(rows) * context)


def test_best_fit_decreasing_stays_within_its_bound():
    # Johnson 1973: at most 11/9 of the fewest rows possible, plus 4.
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 5_000)
    rows = pack_rows(lengths, np.zeros(5_000, int), 1, 64, 0)
    assert len(rows) <= 11 / 9 * np.ceil(lengths.sum() / 64) + 4
    assert rows.fill > 0.985


def test_perfect_packing_is_found():
    rows = pack_rows(np.array([3, 5, 8, 1, 7]), np.zeros(5, int), 1, 8, 0)
    assert len(rows) == 3 and rows.fill == 1.0


def test_same_arguments_same_rows_and_the_seed_matters():
    rng = np.random.default_rng(1)
    lengths, groups = rng.integers(1, 33, 2_000), rng.integers(-1, 7, 2_000)
    first, again, other = (pack_rows(lengths, groups, 7, 32, seed) for seed in (5, 5, 6))
    assert (first.windows == again.windows).all()
    assert (first.row_offsets == again.row_offsets).all()
    assert not (first.windows == other.windows).all()
    assert len(first) == len(other)


def test_order_inside_rows_is_not_by_length():
    lengths = np.tile([20, 12], 500)
    rows = pack_rows(lengths, np.zeros(1_000, int), 1, 32, 0)
    long_first = np.mean([lengths[rows.row(r)[0]] == 20 for r in range(len(rows))])
    assert len(rows) == 500 and 0.4 < long_first < 0.6


def test_saved_rows_load_again(tmp_path):
    rows = pack_rows(np.array([4, 2, 1, 4]), np.array([1, 0, 0, -1]), 3, 4, 0)
    rows.save(tmp_path)
    loaded = Rows.load(tmp_path)
    for name in ("group_offsets", "row_offsets", "windows"):
        assert (getattr(rows, name) == getattr(loaded, name)).all()
    assert loaded.fill == rows.fill


@examples(12)
@given(packings(), st.integers(0, 3), st.integers(1, 30), st.data())
def test_a_corpus_packed_by_shards_is_one_packed_at_once(packing, seed, size, data):
    lengths, groups, n_groups, context = packing
    document = np.sort(data.draw(st.lists(st.integers(0, 9), min_size=len(lengths),
                                          max_size=len(lengths))))
    excluded = np.array(data.draw(st.lists(st.booleans(), min_size=10, max_size=10)))
    windows = np.zeros(len(lengths), WINDOW)
    windows["length"], windows["document"] = lengths, document
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
        root = Path(name)
        files.write_array(root / "windows.npy", windows)
        files.write_array(root / "documents.npy", np.zeros(10, DOCUMENT))
        files.write_json(root / "dataset.json", {"context": context, "key": "some"})
        files.write_array(root / "groups.npy", groups)
        files.write_array(root / "excluded.npy", excluded)
        patched.setattr(pack, "_RANGE", size)
        pack.pack_corpus(TokenDataset(root), root / "groups.npy", root / "excluded.npy", n_groups,
                         seed, root / "parts-of-it", Local(1))
        allowed = np.where(excluded[windows["document"].astype(int)], -1, groups)
        pack_rows(lengths, allowed, n_groups, context, seed).save(root / "at-once")
        by_shards, at_once = ({path.name: path.read_bytes() for path in (root / of).iterdir()}
                              for of in ("parts-of-it", "at-once"))
    assert by_shards == at_once


@pytest.mark.parametrize("text", ["{", "[1]", "7", "{}"])
def test_a_damaged_note_of_rows_is_one_sentence(tmp_path, text):
    pack_rows(np.array([4]), np.array([0]), 1, 4, 0).save(tmp_path)
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=r"rows\.json is (damaged|not valid JSON)"):
        Rows.load(tmp_path)


def test_nothing_to_pack():
    rows = pack_rows(np.array([4]), np.array([-1]), 2, 4, 0)
    assert len(rows) == 0 and rows.group_offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize("lengths, groups", [([5], [0]), ([0], [0]), ([1], [2])])
def test_wrong_lengths_and_groups_are_refused(lengths, groups):
    with pytest.raises(ValueError):
        pack_rows(np.array(lengths), np.array(groups), 2, 4, 0)


def test_a_million_windows_take_seconds():
    rng = np.random.default_rng(2)
    lengths, groups = rng.integers(1, 1025, 1_000_000), rng.integers(0, 1024, 1_000_000)
    start = time.process_time()
    rows = pack_rows(lengths, groups, 1024, 1024, 0)
    assert time.process_time() - start < 8
    assert rows.fill > 0.96


def test_windows_that_no_row_can_hold_are_refused():
    for length in (0, 9):
        with pytest.raises(ValueError, match="between 1 and the context, 8"):
            pack_rows(np.array([3, length]), np.zeros(2, int), 1, 8, 0)
