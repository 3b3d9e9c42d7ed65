"""The sentences about differences between methods: of a run, of its report, of a study.

A difference is of nats per token on the same documents, the first method less the second: below 0
the first is better. Its interval is of 95%. With 0 in the interval or on its edge, the two cannot
be told apart. An interval over documents says what other documents of the domain would give, and
nothing of other trainings; the sentences say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planearly import methods
from planearly.methods import label
from planearly.report.form import number, si

SEED_SPREAD = 0.04
"""Standard deviation over seeds, in nats per token, of a difference between two trainings, where
no seed of one's own tells it: what two seeds of docs/results/nano moved three differences by
(0.041, 0.079 and 0.052; for two draws, the square root of 2 times the deviation)."""
TUNING_SPREAD = 0.01
"""The same of two fine-tunings of one pretraining: 41 pairs of kept studies had 0.0002 to 0.0106
when it was chosen. Of those that came since, sets of 2M tokens have up to 0.018, and a mixture's
pairs up to 0.052."""
ANOTHER = (f"this is one training of each, and another could differ by about {SEED_SPREAD:g} nats "
           "per token")
"""What an interval over documents leaves out."""
ROUTED = ("Where a method has experts, each window of generic text goes through the expert that "
          "this very text chooses, as in the paper: beside a plain model's, such a perplexity is "
          "of a model that has seen what it is scored on.")
"""To stand wherever generic perplexities of experts stand beside a plain model's."""


def side(low: float, high: float, margin: float = 0.0) -> int:
    """Of an interval: -1 below the margin, 1 above it, 0 with the margin in it or on its edge."""
    return -1 if high < margin else 1 if low > margin else 0


def bounds(low: float, high: float) -> str:
    """An interval of a difference, as everywhere: ``[-0.157, -0.140]``."""
    return f"[{low:+.3f}, {high:+.3f}]"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def compared(pair: Mapping[str, Any]) -> str:
    """One entry of ``comparisons`` of results.json."""
    low, high = pair["ci95"]
    if side(low, high) == 0:
        return (f"{pair['domain']}: {pair['a']} and {pair['b']} cannot be told apart "
                f"({pair['difference']:+.4f} nats per token, 95% interval over documents "
                f"{low:+.4f} to {high:+.4f})")
    better, worse = ("a", "b") if side(low, high) < 0 else ("b", "a")
    least, most = sorted((abs(low), abs(high)))
    return (f"{pair['domain']}: {pair[better]} is {abs(pair['difference']):.4f} nats per token "
            f"better than {pair[worse]} on these documents (95% interval {least:.4f} to "
            f"{most:.4f}); {ANOTHER}")


def summary(rows: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]] = (),
            macro: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """What came out of a run, for somebody who reads nothing else.

    Args:
        rows, comparisons, macro: of results.json.
    """
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    of = {(row["domain"], row["method"]): row for row in rows}
    average = {one["method"]: one["after"]["perplexity"] for one in macro if one["domains"] > 1}
    names = [_named(rows, importance=True), _named(rows, importance=False)]
    pairs = [(of[d, names[0]], of[d, names[1]]) for d in domains
             if (d, names[0]) in of and (d, names[1]) in of]
    said = []
    if len(pairs) == 1:
        said.append(_importance(*pairs[0], comparisons))
    elif pairs:
        said.append(_importance_over(pairs, comparisons, average))
    if len(domains) == 1:
        ranked = sorted(rows, key=lambda row: row["ppl_after"])
        if not pairs or ranked[0]["method"] != names[0]:
            every = ", ".join(f"{label(r['method'])} {number(r['ppl_after'])}" for r in ranked)
            said.append(f"Perplexity on {domains[0]} after fine-tuning: {every}.")
        best = ranked[0]
        if best.get("ppl_before"):
            said.append(
                f"Fine-tuning on the domain's documents brought {label(best['method'])} from "
                f"{number(best['ppl_before'])} to {number(best['ppl_after'])}.")
    elif average and (not pairs or len(average) > 2):
        best_method = min(average, key=lambda method: average[method])
        said.append(
            f"The lowest macro-averaged perplexity over the {len(domains)} domains after "
            f"fine-tuning is that of {label(best_method)}, {number(average[best_method])}.")
    return said


def ranked(average: Mapping[str, float]) -> str:
    """Methods with their perplexities: small models from the best to the worst, then large."""
    order = sorted(average, key=lambda method: average[method])
    parts = [", ".join(f"{label(m)} {number(average[m])}" for m in order
                       if is_large(m) == large) for large in (False, True)]
    return "; of the large model: ".join(filter(None, parts))


def is_large(method: str) -> bool:
    """Whether a row's method deploys the large model."""
    name = method.partition(",")[0]
    return name in methods.TABLE and methods.TABLE[name].large


def is_routed(row: Mapping[str, Any]) -> bool:
    """Whether a row's generic perplexity chose experts by the text it is of (:data:`ROUTED`).

    That of a bundle's expert is of this expert alone. In rows that do not say (older ones), it is
    taken to be routed wherever there are experts.
    """
    one = methods.TABLE.get(row["method"])
    return row.get("generic_ppl_routed", one is not None and one.experts)


def _named(rows: Sequence[Mapping[str, Any]], importance: bool) -> str | None:
    """The run's method that samples by importance; or its equal that takes generic text as it
    is."""
    for name in dict.fromkeys(row["method"] for row in rows):
        one = methods.TABLE.get(name)
        if one and not one.large and one.bank is None and one.tune == "full" and (
                one.draws == ("importance" if importance else methods.GENERIC)):
            return name
    return None


def _importance(ours: Mapping[str, Any], plain: Mapping[str, Any],
                comparisons: Sequence[Mapping[str, Any]]) -> str:
    """What importance sampling bought on one domain."""
    a, b = ours["ppl_after"], plain["ppl_after"]
    which = "lower" if a <= b else "higher"
    ending = {
        -1: f"lower, beyond the 95% interval over documents; {ANOTHER}",
        1: "higher, beyond the 95% interval over documents: here importance sampling did not pay; "
           f"{ANOTHER}",
        0: f"{which}, but within the 95% interval over documents, so the two cannot be told apart",
    }[_side(ours, plain, comparisons)]
    return (f"After fine-tuning, {label(ours['method'])} reaches a perplexity of {number(a)} on "
            f"{ours['domain']}, where the same model without importance sampling reaches "
            f"{number(b)}{_equal(ours, plain)}: {abs(1 - a / b):.1%} {ending}.")


def _importance_over(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
                     comparisons: Sequence[Mapping[str, Any]], average: Mapping[str, float],
                     ) -> str:
    """The same over several domains."""
    ours, plain = (row["method"] for row in pairs[0])
    sides = [_side(*pair, comparisons) for pair in pairs]
    reach = ""
    if ours in average and plain in average:
        reach = (f"{label(ours)} reaches a macro-averaged perplexity of {number(average[ours])} "
                 "after fine-tuning, where the same model without importance sampling reaches "
                 f"{number(average[plain])}{_equal(*pairs[0])}. ")
    return (f"Over {len(pairs)} domains, {reach}Beyond the 95% interval over documents, "
            f"{label(ours)} is lower in {sides.count(-1)} of them and higher in {sides.count(1)}; "
            f"{ANOTHER}.")


def _side(ours: Mapping[str, Any], plain: Mapping[str, Any],
          comparisons: Sequence[Mapping[str, Any]]) -> int:
    """-1: ours is better. By the paired difference where it is known, and else by whether the
    intervals overlap, which is more cautious."""
    names = (ours["method"], plain["method"])
    for found in comparisons:
        if found["domain"] == ours["domain"] and {found["a"], found["b"]} == set(names):
            turn = 1 if found["a"] == names[0] else -1
            return turn * side(*found["ci95"])
    a, b = (row.get("ppl_after_ci") or [row["ppl_after"]] * 2 for row in (ours, plain))
    return side(a[0] - b[1], a[1] - b[0])


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    same = a.get("pretrain_tokens") == b.get("pretrain_tokens") is not None
    return f", at the same {si(a['pretrain_tokens'])} tokens of pretraining" if same else ""
