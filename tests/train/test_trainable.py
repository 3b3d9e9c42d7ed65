"""How a step's rows are divided into microbatches."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly import keys
from planearly.model.projected import Projected
from planearly.model.transformer import Transformer
from planearly.train.trainable import Dense, Trainable
from small_trainings import SHAPE

MODELS: list[Trainable] = [Dense(Transformer(SHAPE)), Projected(SHAPE, keys.Projected(7, 2, 3))]


@pytest.mark.parametrize("model", MODELS, ids=["dense", "projected"])
@examples(50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 9))
def test_microbatches_are_as_few_as_hold_all_rows(model: Trainable, groups: list[int],
                                                  rows: int) -> None:
    parts = model.microbatches(np.array(groups), rows)
    assert len(parts) == math.ceil(len(groups) / rows)
    sizes = [len(part) for part in parts]
    assert max(sizes) <= rows and min(sizes) >= max(max(sizes) - 1, 1)
    order = list(range(len(groups)))
    if isinstance(model, Projected):
        order.sort(key=groups.__getitem__)
    assert np.concatenate(parts).tolist() == order
