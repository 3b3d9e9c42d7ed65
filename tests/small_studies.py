"""Studies of generated rows, in worlds where the paper's claims hold or do not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from planearly import methods
from planearly.keys import Recipe
from planearly.report import table
from planearly.studies.paper import SUITE
from planearly.study import sharing
from planearly.study.verdict import Claim

DOMAINS = ["arxiv", "freelaw", "stackexchange", "wikipedia"]
BASE: dict[str, Any] = {
    "spec_tokens": 50_000, "pretrain_tokens": 8_000_000, "importance.k": None,
    "expert": "lowest-loss", "projected.experts": 16, "projected.rank": 12,
    "mixture.experts": 16, "seed": 0,
    "pretrain.specialization_share": 0.0, "finetune.replay_share": 0.0,
    "pretrain.optimizer.preset": "modern", "cluster.embedder": "static",
}
ALL = ["slm", "slm-nopt", "slm-d", "slm-is", "slm-mix", "slm-pn", "llm", "llm-lora"]
SHARED = {"slm": 1.0, "slm-mix": 1.0, "slm-pn": 1.6, "llm": 4.0, "llm-lora": 4.0, "slm-d": 5.0}
PER_TOKEN = 3e7
DOCUMENTS = 60

Level = Callable[[str, Mapping[str, Any], str], float]
Change = Mapping[str, Any]


def recipe() -> dict[str, Any]:
    values = Recipe().to_dict()
    for dotted, value in BASE.items():
        *parents, last = dotted.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        place[last] = value
    return values


def plain(method: str, settings: Mapping[str, Any], domain: str) -> float:
    """Nats per token after fine-tuning where all of the paper's claims hold."""
    level = 4.0 + 0.2 * DOMAINS.index(domain)
    level -= 0.1 * math.log2(settings["pretrain_tokens"] / 8e6)
    data = math.log2(settings["spec_tokens"] / 50_000)
    level -= 0.1 * data
    wide = domain == "wikipedia"
    if method == "slm-nopt":
        level += 1.0 - 0.1 * data
    elif method == "slm-is":
        level -= 0.2 + 0.02 * math.log2((settings["importance.k"] or 256) / 64)
    elif method in ("slm-pn", "slm-mix"):
        advantage = 0.1 - 0.03 * data
        level += 0.02 if wide and settings["expert"] != "blend" else -advantage
        level -= {16: 0.0, 32: 0.02, 64: 0.025}[settings["projected.experts"]]
        level += 0.02 * (method == "slm-mix") + 0.03 * (settings["expert"] == "most-frequent")
    elif method == "slm-d":
        level -= 0.02
    elif method in ("llm", "llm-lora"):
        level -= 0.2
    elif method == "slm-top":
        level += 0.1
    return level


def cost(tokens: float, factor: float) -> dict[str, Any]:
    flops = tokens * factor * PER_TOKEN
    return {"tokens": int(tokens), "flops": flops, "device_hours": flops / 1e15, "device": "a box",
            "money": None}


def row(method: str, domain: str, changes: Change, level: Level) -> dict[str, Any]:
    settings = {**BASE, **changes}
    draw = np.random.default_rng(DOMAINS.index(domain))  # a document is as hard for every method
    tokens = draw.integers(40, 200, DOCUMENTS)
    hard = draw.normal(0, 0.5, DOCUMENTS)
    of = methods.find(method)
    begun = {key: value for key, value in changes.items()  # what fine-tunings share
             if sharing.pretraining_depends(method, key) or (of.bank and key == "expert")}

    def told(kind: str, given: Change) -> np.ndarray:
        """Nats per token of the documents, by chance apart from their level."""
        draw = np.random.default_rng([*f"{kind} {domain} {sorted(given.items())}".encode()])
        chance = draw.normal(0, 0.02, DOCUMENTS)
        chance -= chance @ tokens / tokens.sum()  # differences are those of the levels
        return level(method, {**BASE, **given}, domain) + hard + chance

    base = level(method, settings, domain)
    after, before = tokens * told(method, changes), tokens * (told(of.pretraining(), begun) + 0.8)
    pretrained = settings["pretrain_tokens"]
    generic = cost(pretrained, SHARED[method]) if method in SHARED else cost(0, 1)
    tuning = settings["spec_tokens"] * 5
    special = cost(tuning if method in SHARED or method == "slm-nopt" else tuning + pretrained, 1)
    both = {key: generic[key] + special[key] for key in ("tokens", "flops", "device_hours")}
    nothing = method == "slm-nopt"
    return {
        "method": method, "domain": domain, "seed": settings["seed"], "settings": settings,
        "spec_tokens": settings["spec_tokens"], "pretrain_tokens": pretrained,
        "params": 400_000, "inference_params": 400_000, "non_embedding_params": 300_000,
        "inference_flops_per_token": 10_000_000, "best_step": 40,
        "generic_ppl": None if nothing else math.exp(base + 1), "generic_ppl_after": 90.0,
        "generic_ppl_ci": [math.exp(base), math.exp(base + 2)],
        "nll_after": after.tolist(), "nll_before": None if nothing else before.tolist(),
        "nll_routed": (before - 0.05 * tokens).tolist() if of.bank else None,
        "tokens": tokens.tolist(), "expert": settings["expert"], "expert_share": 0.5,
        "k": {"slm-pn": settings["projected.experts"],
              "slm-mix": settings["mixture.experts"]}.get(method, 256),
        "finetuning": {"best_step": 40, "steps": 60, "validation": [[1000, 5.0]]},
        "cost": {**both, "device": "a box", "money": None}, "generic_cost": generic,
        "specialization_cost": special,
        **({"foresight": {"gain": level(method, settings, domain) / 10, "ci95": [-0.5, 1.0],
                          "tokens": 1_000_000}} if of.needs_domain else {}),
    }


def study(*blocks: tuple[list[str], list[Change], list[str]], level: Level = plain,
          ) -> dict[str, Any]:
    """Rows of blocks of methods, changes and domains, each once."""
    rows: dict[str, dict[str, Any]] = {}
    for names, all_changes, domains in blocks:
        for changes in all_changes:
            for method in names:
                for domain in domains:
                    made = row(method, domain, changes, level)
                    rows.setdefault(json.dumps([method, domain, made["settings"]]), made)
    return {
        "name": "generated", "recipe": recipe(), "device": "a box", "seconds": 1.0,
        "domains": DOMAINS, "rows": list(rows.values()), "skipped": [], "pending": [],
        "entropies": {domain: {str(k): {"entropy": 0.5 + i, "largest_share": 0.9 / (i + 1)}
                               for k in (16, 64)} for i, domain in enumerate(DOMAINS)},
        "models": {}, "calibration": None,
    }


def repeated(made: dict[str, Any], level: Level = plain, seeds: int = 3) -> dict[str, Any]:
    """A study with further seeds of every row."""
    known = {json.dumps([r["method"], r["domain"], r["settings"]]) for r in made["rows"]}
    further = [row(r["method"], r["domain"], {**r["settings"], "seed": seed}, level)
               for r in made["rows"] for seed in range(1, seeds + 1)]
    rows = [r for r in further
            if json.dumps([r["method"], r["domain"], r["settings"]]) not in known]
    return {**made, "rows": [*made["rows"], *rows]}


def of_one_seed(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "rows": [r for r in made["rows"] if r["seed"] == 0]}


def full(level: Level = plain) -> dict[str, Any]:
    """A whole grid; budgets on two domains only."""
    experts = ["slm-pn", "slm-mix"]
    return study(
        (ALL, [{}, {"spec_tokens": 400_000}], DOMAINS),
        (["slm", "slm-is", "slm-pn", "llm"],
         [{"pretrain_tokens": n} for n in (2_000_000, 32_000_000)], DOMAINS[:2]),
        (["slm-is", "slm-top"], [{"importance.k": k} for k in (16, 64, 256)], DOMAINS),
        (["slm-knn", "slm-dsir"], [{}], DOMAINS),
        (["slm-knn", "slm-is"], [{"cluster.embedder": "sentence-bert"}], DOMAINS),
        (experts, [{"expert": rule} for rule in ("blend", "most-frequent")], DOMAINS),
        (["slm-pn"], [{"projected.experts": n, "projected.rank": h}
                      for n, h in ((32, 12), (64, 12), (32, 23), (64, 46))], DOMAINS),
        (["slm-mix"], [{"mixture.experts": 64}], DOMAINS),
        (["slm"], [{"finetune.replay_share": 0.2}, {"pretrain.optimizer.preset": "paper"},
                   {"seed": 1}], DOMAINS),
        (["slm-is"], [{"pretrain.specialization_share": 0.1}], DOMAINS), level=level)


def tables(made: Mapping[str, Any]) -> list[table.Table]:
    return SUITE.of(made)[0]


def claims(made: Mapping[str, Any]) -> list[Claim]:
    return SUITE.of(made)[1]


def named(made: list[table.Table], name: str) -> table.Table:
    return next(t for t in made if t.name == name)


def claim(found: list[Claim], start: str) -> Claim:
    return next(c for c in found if c.text.startswith(start))
