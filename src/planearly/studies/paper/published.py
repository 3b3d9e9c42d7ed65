"""The paper's own numbers (arXiv 2402.01093v2), which stand beside a study's."""

from __future__ import annotations

import math

SCALE = {
    "slm": (126e6, 126e6, 2.2, (100, 200, 400, 530)), "slm-is": (126e6, 126e6, 2.2, (130,)),
    "slm-mix": (126e6, 2_016e6, 2.2, (100, 200, 400, 600)),
    "slm-pn": (126e6, 1_422e6, 3.6, (100, 200, 400, 600)),
    "llm": (771e6, 771e6, 7.7, (100, 200, 400, 600)),
    "llm-lora": (771e6, 771e6, 7.7, (100, 200, 400, 600))}
"""By method: deployed and trained parameters (Tables 1 and 7), A100-hours per 1B tokens (Table 2)
and A100-hours of pretraining (Tables 3 and 8)."""
CLUSTERS = {"slm-is": 1024, "slm-mix": 16, "slm-pn": 32}
CONTEXT = 1024
SETS = (1e6, 8e6, 64e6)
"""Tokens of its specialization sets."""
BASELINES = {"slm": (33.0, 18.2, 14.8, 12.0), "slm-nopt": (math.nan, 227.1, 45.6, 17.6),
             "llm": (28.1, 14.4, 12.5, 10.0)}
"""Perplexity before fine-tuning and after it on each of :data:`SETS` (Table 4)."""
BUDGETS = {
    100: {"slm": (33.74, 19.31, 15.61, 12.37), "slm-mix": (34.35, 19.82, 15.82, 12.62),
          "slm-pn": (33.44, 18.57, 15.58, 12.53), "llm": (29.22, 17.11, 15.49, 11.55)},
    200: {"slm": (34.43, 18.58, 15.12, 12.09), "slm-mix": (31.94, 18.48, 14.98, 12.15),
          "slm-pn": (32.30, 17.76, 14.95, 12.13), "llm": (28.18, 15.62, 14.03, 10.81)},
    400: {"slm": (36.61, 18.22, 14.80, 12.00), "slm-mix": (31.04, 17.56, 14.42, 11.84),
          "slm-pn": (32.54, 17.17, 14.48, 11.86), "llm": (28.98, 15.03, 13.05, 10.28)},
    600: {"slm-mix": (31.03, 17.18, 14.21, 11.73), "slm-pn": (32.53, 16.95, 14.29, 11.74),
          "llm": (28.62, 14.50, 12.64, 10.07)}}
"""The same by A100-hours of pretraining (Table 8)."""
LOWEST_LOSS, MOST_FREQUENT = 17.05, 17.32
"""Perplexity of a mixture of 64 by the choice of its expert, at the smallest set (Table 5)."""
SHARES = {
    "arxiv": (.95, .92, .55, .52, .29), "europarl": (.52, .53, .45, .44, .27),
    "freelaw": (.48, .73, .87, .72, .35), "gutenberg": (.75, .54, .35, .27, .29),
    "opensubtitles": (.97, .68, .26, .28, .32), "openwebtext2": (.53, .35, .12, .04, .02),
    "pubmed_abstracts": (.94, .54, .41, .20, .06), "stackexchange": (.95, .94, .78, .61, .31),
    "wikipedia": (.71, .58, .21, .07, .03), "generic": (.32, .12, .04, .02, .00)}
"""Share of a domain in its most frequent of 4, 16, 64, 256 and 1,024 clusters (Table 9)."""
ENTROPIES = {"wikipedia": (1.73, 3.20, 4.54, 5.64), "openwebtext2": (2.19, 3.60, 4.89, 6.12),
             "generic": (2.73, 4.07, 5.46, 6.85)}
"""Entropy in nats over 16, 64, 256 and 1,024 clusters (Table 10), of the widest and of c4."""
BY_CLUSTERS = {
    what: {domain: dict(zip(ks, values, strict=True)) for domain, values in found.items()}
    for what, ks, found in (("largest_share", (4, 16, 64, 256, 1024), SHARES),
                            ("entropy", (16, 64, 256, 1024), ENTROPIES))}
HOURS = {"slm": 530, "slm-d": 1850}
"""A100-hours of pretraining of a model and of a student with its teacher (Table 3)."""
WIDE = ("On openwebtext2 and wikipedia, the widest by the entropy over clusters (Table 10), "
        "neither slm-pn nor slm-mix beats slm.")
FINER = "Better from k = 16 to k = 1,024 (Figure 10)."
TRADED = ("32 experts are the best trade-off of cost and quality for slm-pn (Figure 7), with h = "
          "12, 23 and 46 slices for 16, 32 and 64.")
TOP = "Worse (Figure 8)."
TAUGHT = (f"The gain is gone once the teacher's hours are counted: {HOURS['slm-d']:,} A100-hours "
          f"with the teacher's, {HOURS['slm']} of slm's (Table 3).")
ADAPTERS = "Within 0.5 of the perplexity of full fine-tuning, at rank 64 (Figure 14)."
CROSSING = ("slm-is is the cheaper for few domains, slm-pn for many (Figure 6 has 1, 7 and 50); at "
            "most 130 A100-hours for each domain, and 650 before all of them with 0.02 for each.")
"""What it says of these without a table's numbers."""
DOMAINS = (1, 7, 50)
"""Numbers of domains of its Figure 6."""
ERODING = 400
"""A100-hours, the most with which it has slm, at which larger sets are told."""


def against(method: str, other: str) -> str:
    """A method against another after fine-tuning on the smallest set, by budget; slm with its most
    hours for those with more."""
    said = [f"{of(found[method][1], found[other][1])} with {hours} A100-hours"
            for hours, found in BUDGETS.items() if {method, other} <= found.keys()]
    if other == "slm":
        most = max(BUDGETS)
        said.append(f"{of(BUDGETS[most][method][1], BASELINES[other][1])} with {most} against "
                    f"{HOURS[other]}")
    return f"{'; '.join(said)} (Tables 4 and 8)." if other == "slm" else \
        f"{'; '.join(said)} (Table 8)."


def of(ours: float, theirs: float) -> str:
    """Two perplexities and the difference of their logarithms, as in ``18.57 against 19.31:
    -0.039``."""
    return f"{ours:.4g} against {theirs:.4g}: {math.log(ours / theirs):+.3f}"


def tuned() -> str:
    """Fine-tuning on the smallest set against none."""
    pairs = {"slm": BASELINES["slm"], "llm": BASELINES["llm"],
             **{method: BUDGETS[600][method] for method in ("slm-mix", "slm-pn")}}
    return "; ".join(f"{method} {of(found[1], found[0])}"
                     for method, found in pairs.items()) + " (Tables 4 and 8)."


def beyond() -> str:
    """A fine-tuned small model against the large one that was not."""
    return f"{of(BASELINES['slm'][1], BASELINES['llm'][0])} (Table 4)."


def unpretrained() -> str:
    """No pretraining against slm, on each set."""
    return "; ".join(f"at {size / 1e6:g}M {of(ours, theirs)}" for size, ours, theirs in zip(
        SETS, BASELINES["slm-nopt"][1:], BASELINES["slm"][1:], strict=True)) + " (Table 4)."


def sampled() -> str:
    """Where slm-is stands: the paper draws it."""
    small, large = BASELINES["slm"][1], BASELINES["llm"][1]
    return (f"Below the large model's {large:g} (a curve of Figure 4b), and so more than "
            f"{math.log(small / large):.3f} below slm's {small:g}, with 130 A100-hours for a "
            "domain and 530 of slm's.")


def more_text() -> str:
    """Each set against the next smaller one."""
    return "; ".join(f"{method} at {size / 1e6:g}M {of(ours, theirs)}"
                     for method in ("slm", "llm")
                     for size, ours, theirs in zip(SETS[1:], BASELINES[method][2:],
                                                   BASELINES[method][1:], strict=False)
                     ) + " (Table 4)."


def eroded(method: str) -> str:
    """A method less slm on each set."""
    found = BUDGETS[ERODING]
    return f"With {ERODING} A100-hours " + "; ".join(
        f"at {size / 1e6:g}M {math.log(ours / theirs):+.3f}" for size, ours, theirs in zip(
            SETS, found[method][1:], found["slm"][1:], strict=True)) + " (Table 8)."


def chosen() -> str:
    """The expert of the lowest loss against that of the most frequent cluster."""
    return f"A mixture of 64: {of(LOWEST_LOSS, MOST_FREQUENT)} (Table 5)."
