"""The grid: which cells there are, and how their budgets share."""

import pytest

from planearly import config
from planearly.errors import UserError
from planearly.study import grid
from small_runs import with_grid


def names(cells):
    return [(cell.method, cell.domain, dict(cell.variant.changes)) for cell in cells]


def test_a_grid_is_every_combination_of_each_block_once(made):
    recipe = with_grid(made, {"methods": ["slm", "slm-is"]},
                       {"methods": ["slm"], "over": {"spec_tokens": [None, 200, "1k"],
                                                     "seed": [0, 1]}})
    cells = grid.cells(recipe, ["law"])
    assert names(cells) == [
        ("slm", "law", {}), ("slm-is", "law", {}), ("slm", "law", {"seed": 1}),
        ("slm", "law", {"spec_tokens": 200}), ("slm", "law", {"spec_tokens": 200, "seed": 1}),
        ("slm", "law", {"spec_tokens": 1000}), ("slm", "law", {"spec_tokens": 1000, "seed": 1})]
    assert all(cell.settings.keys() == {"spec_tokens", "seed"} for cell in cells)
    assert cells[1].settings == {"spec_tokens": None, "seed": 0}


@pytest.mark.parametrize("block, said", [
    ({"methods": ["slm"], "over": {"spec_token": [1]}}, "spec_token"),
    ({"methods": ["slm"], "domains": ["lav"]}, "did you mean 'law'"),
    ({"methods": []}, "names no methods"),
    ({"methods": ["slm", "slm-si"]}, r"\(block 1\) names the method 'slm-si'; did you mean 'slm"),
    ({"methods": ["slm"], "over": {"spec_tokens": []}}, "gives 'spec_tokens' no values"),
    ({"methods": ["slm"], "over": {"spec_tokens": None}}, "gives 'spec_tokens' no values"),
    *(({"methods": ["slm"], "over": {key: [value]}}, f"varies '{key}' under 'over', which is no")
      for key, value in (("model", {"layers": 2}), ("study", {}), ("study.grid", []),
                         ("methods", ["slm"]), ("domains", ["law"]), ("engine", "ray"))),
])
def test_a_misspelt_grid_is_refused(made, block, said):
    with pytest.raises(UserError, match=said):
        grid.cells(with_grid(made, block), ["law"])
    with pytest.raises(UserError, match=r"study\.grid"):
        grid.cells(with_grid(made), ["law"])


def test_every_budget_of_a_grid_can_share_with_every_other(made):
    recipe = with_grid(made, {"methods": ["slm", "slm-pn"]},
                       {"methods": ["slm"], "over": {"pretrain_tokens": ["12k"]}},
                       {"methods": ["slm"], "over": {"pretrain_tokens": [2000, "1k", -5, "much"]}},
                       {"methods": ["slm"], "over": {"seed": [1]}}, pretrain_tokens=4000)
    cells = grid.cells(recipe, ["law"])
    found = [(of.pretrain_tokens, of.pretrain.branch_tokens) for cell in cells
             if (of := cell.variant.recipe)]
    budgets = [1000, 2000, 4000, 12_000]
    assert found == [(n, budgets) for n in (4000, 4000, 12_000, 2000, 1000, 4000)]
    assert sum(cell.variant.recipe is None for cell in cells) == 2


def test_methods_take_their_main_budgets_where_a_block_names_none(made):
    recipe = with_grid(made, {"methods": ["slm", "slm-is"], "over": {"seed": [0, 1]}},
                       {"methods": ["slm"], "over": {"pretrain_tokens": [2000]}},
                       pretrain_tokens=4000)
    recipe = config.variant(recipe, {"study.main": {"slm": 8000}})
    assert [(cell.method, cell.settings["pretrain_tokens"], cell.settings["seed"])
            for cell in grid.cells(recipe, ["law"])] == [
        ("slm", 8000, 0), ("slm", 8000, 1), ("slm-is", 4000, 0), ("slm-is", 4000, 1),
        ("slm", 2000, 0)]
    recipe = config.variant(recipe, {"study.main": {"slm-pm": 8000}})
    with pytest.raises(UserError, match="'slm-pm', which no block"):
        grid.cells(recipe, ["law"])
