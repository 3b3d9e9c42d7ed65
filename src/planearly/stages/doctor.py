"""``planearly doctor``: whether a run folder is whole, and what the same command would make again.

Every stage's files are held against the sizes and digests that its manifest recorded, the stages
that the run's recipe needs are looked up without making any, and ``results.json`` is held against
what they found.
"""

from __future__ import annotations

import glob
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from planearly import keys, methods
from planearly.errors import UserError
from planearly.files import file_digest, line_of_json, read_json
from planearly.progress import progress, say
from planearly.stages import corpus, evaluate, exchange, trained
from planearly.stages.folder import Missing, Run
from planearly.stages.manifest import MANIFEST, fingerprint_of, identity_of
from planearly.stages.noted import RECIPE, RESULTS, differences, recipe_of

_STAGE = re.compile(r".+-[0-9a-f]{8}", re.DOTALL)  # a domain may be called anything


@dataclass(frozen=True)
class Finding:
    """What is wrong with a stage or with the results, and what to do about it."""

    folder: str
    """Under the run folder."""
    kind: str
    """``damaged``, ``unfinished`` or ``older``."""
    told: str


@dataclass(frozen=True)
class Again:
    """A stage that the same command would make, although the folder may hold others of its name."""

    stage: str
    why: str


@dataclass
class Examination:
    """What was found in a run folder."""

    out: Path
    whole: int = 0
    """Finished stages whose files are as their manifests say."""
    findings: list[Finding] = field(default_factory=list)
    again: list[Again] = field(default_factory=list)
    not_looked: str = ""
    """Why it is not known what would be made again."""

    @property
    def damaged(self) -> list[Finding]:
        return [found for found in self.findings if found.kind == "damaged"]

    @property
    def well(self) -> bool:
        """Whether every stage is whole and the run finished."""
        return not (self.damaged or self.again or self.not_looked)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


Model = tuple[keys.Recipe, str, str]
"""A recipe, the method and the domain ("": any) that a model is wanted of."""


def examine(out: Path, models: Sequence[Model] | None = None, deep: bool = True) -> Examination:
    """Examine a run folder; changes nothing in it.

    Args:
        models: what is to be looked up in it (default: all of the recipe in the folder).
        deep: read all files and compare their digests; else their sizes alone.

    Raises:
        UserError: it is no run folder.
    """
    recipe = recipe_of(out)
    found = Examination(out)
    folders = sorted(_stage_folders(out))
    with progress("examining stages", len(folders), "stages") as meter:
        for folder in folders:
            wrong = list(_of_stage(out, folder, deep))
            found.findings += wrong
            found.whole += not wrong
            meter.advance(1)
    made: list[trained.Trained] = []
    found.again, found.not_looked = _would_be_made(out, recipe, models, made)
    if models is None and (out / RESULTS).exists():
        whole = not (found.damaged or found.again or found.not_looked)
        _check_results(_Looking(out, recipe, {}), made if whole else [], found)
    return found


def _check_results(run: Run, made: list[trained.Trained], found: Examination) -> None:
    """Note what is wrong with the results of a run.

    Args:
        made: its models, whose evaluations they are; empty: not all are there.
    """
    def altered(why: str) -> Finding:
        return Finding(RESULTS, "damaged", f"{RESULTS} {why}: the same command writes it again")

    try:
        told = read_json(run.out / RESULTS)
    except UserError:
        told = None
    if not (isinstance(told, dict) and {"recipe", "rows"} <= told.keys()):
        found.findings.append(altered("is damaged"))
    elif not _agree(told["recipe"], run.recipe.to_dict()):
        found.again.append(Again(RESULTS, f"it is of other settings than {RECIPE}"))
    elif made and not _agree(told, json.loads(line_of_json(evaluate.results_of(run, made)))):
        found.findings.append(altered("does not say what the evaluations in the folder do"))


def _agree(told: Any, now: Any) -> bool:
    """Whether values are equal, but for fields that an earlier version of the code did not tell or
    a later one does not."""
    if isinstance(told, dict) and isinstance(now, dict):
        return all(_agree(told[key], now[key]) for key in told.keys() & now.keys())
    if isinstance(told, list) and isinstance(now, list):
        return len(told) == len(now) and all(map(_agree, told, now))
    return bool(told == now)


def _stage_folders(out: Path) -> Iterator[Path]:
    """Folders of stages, finished or not: ``NAME-FINGERPRINT`` at most two levels down."""
    for path in [*out.glob("*"), *out.glob("*/*")]:
        inside = path.parent != out and (_STAGE.fullmatch(path.parent.name)
                                         or path.parent.name.startswith("."))
        if path.is_dir() and _STAGE.fullmatch(path.name) and not inside:
            yield path


def _of_stage(out: Path, folder: Path, deep: bool) -> Iterator[Finding]:
    """What is wrong with a stage."""
    place = folder.relative_to(out).as_posix()
    mend = f"remove it (rm -r {shlex.quote(str(folder))}), and the same command makes it again"
    if not (folder / MANIFEST).exists():
        yield Finding(place, "unfinished", f"{place} was interrupted: the same command goes on "
                      "from what it left, unless its settings changed")
        return
    try:
        manifest = read_json(folder / MANIFEST)
        fingerprint = fingerprint_of(manifest)
        recorded = [(name, size, digest)
                    for name, (size, digest) in manifest.get("files", {}).items()]
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        yield Finding(place, "damaged", f"the {MANIFEST} of {place} is damaged: {mend}")
        return
    if fingerprint != manifest.get("fingerprint") or not folder.name.endswith(fingerprint[:8]):
        yield Finding(place, "damaged", f"the {MANIFEST} of {place} was changed, it no longer "
                      f"gives the name of its folder: {mend}")
    if "files" not in manifest:
        yield Finding(place, "older", f"{place} is of an older layout, which did not record its "
                      "files: whether they are as they were cannot be told")
        return
    for name, size, digest in recorded:
        path = folder / name
        if not path.is_file():
            yield Finding(place, "damaged", f"{place}/{name} is missing: {mend}")
        elif path.stat().st_size != size or (deep and file_digest(path) != digest):
            yield Finding(place, "damaged", f"{place}/{name} is not as it was when the stage was "
                          f"finished: {mend}")


class _Looking(Run):
    """A run that makes nothing, and notes the stages that it lacks."""

    def __init__(self, out: Path, recipe: keys.Recipe, lacking: dict[str, Again]) -> None:
        super().__init__(out, recipe, build=False)
        self.lacking = lacking

    def stage(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, Path],
              build: Callable[[Path], dict[str, Any] | None], **more: Any) -> Path:
        try:
            return super().stage(name, settings, inputs, build, **more)
        except Missing:
            needed = identity_of(name, settings, inputs, more.get("version", 1))
            self.lacking.setdefault(name, Again(name, _why(self.out, name, needed)))
            raise


def _why(out: Path, name: str, needed: Mapping[str, Any]) -> str:
    """Why no finished stage of the folder is the one that is needed."""
    others: list[list[str]] = []
    for path in sorted(out.glob(f"{glob.escape(name)}-{'?' * 8}/{MANIFEST}")):
        try:
            made = read_json(path)
        except UserError:
            continue
        if isinstance(made, dict):
            before = {key: made.get(key, {}) for key in ("settings", "inputs")}
            now = {key: needed[key] for key in ("settings", "inputs")}
            changed = sorted(place.partition(".")[2] if place.startswith("settings.")
                             else f"the stage '{place.partition('.')[2]}' that it reads"
                             for place in differences(before, now))
            if made.get("version", 1) != needed.get("version", 1):
                changed.append(f"the code that makes it (version {needed.get('version', 1)})")
            others.append(changed)
    if not others:
        return "it is not made yet"
    nearest = min(others, key=len)
    return (f"{len(others)} of this name are there, and the nearest differs in "
            f"{', '.join(nearest[:6])}{', ...' if len(nearest) > 6 else ''}")


def _would_be_made(out: Path, recipe: keys.Recipe, models: Sequence[Model] | None,
                   made: list[trained.Trained]) -> tuple[list[Again], str]:
    """The first stages on the way to every model that are lacking; or why that is not known.

    Args:
        made: takes the models that are there, exported.
    """
    lacking: dict[str, Again] = {}
    runs: dict[int, Run] = {}
    reasons: list[str] = []
    try:
        wanted = list(_all(out, recipe, lacking) if models is None else models)
    except UserError as error:
        return [], str(error)
    for of, method, domain in wanted:
        run = runs.setdefault(id(of), _Looking(out, of, lacking))
        try:
            trained.check(of)
            if not domain:
                trained.pretrain(run, method)
                continue
            if domain in corpus.histograms(run):
                if exchange.draws_by_histogram(of, row := methods.of(of, method)):
                    exchange.handed(run, row, domain)
                continue
            one = trained.specialize(run, method, domain)
            evaluate.evaluations(run, one)
            one.routed()
            if models is not None:  # a study's
                one.routed(domain)
            if (out / RESULTS).exists():
                evaluate.exported(run, one)
                made.append(one)
        except Missing:
            continue
        except UserError as error:
            reasons.append(f"{method}: {error}")
    if models is not None and len(reasons) < len(wanted):
        reasons.clear()  # cells of a study that cannot work, which its page tells
    return list(lacking.values()), next(iter(reasons), "")


def _all(out: Path, recipe: keys.Recipe, lacking: dict[str, Again]) -> Iterator[Model]:
    """Every method of a recipe on every domain; without domains, what is the same for all."""
    try:
        names = list(corpus.domain_names(_Looking(out, recipe, lacking)))
    except Missing:
        return
    for name in names or [""]:
        yield from ((recipe, method, name) for method in recipe.methods
                    if name or not methods.find(method).per_domain)


def show(found: Examination) -> None:
    """The findings on standard output, and what to do."""
    older = [one for one in found.findings if one.kind == "older"]
    for one in found.findings:
        if one.kind != "older":
            print(one.told)
    if older:
        print(f"{len(older)} stages are of an older layout, which did not record their files: "
              "whether these are as they were cannot be told, and they are used as they are")
    for again in found.again:
        print(f"{again.stage} would be made, and what is made from it: {again.why}")
    if found.not_looked:
        print(f"what would be made again is not known: {found.not_looked}")
    counts = {"whole": found.whole, "of an older layout": len(older),
              "interrupted": sum(one.kind == "unfinished" for one in found.findings)}
    state = ", ".join(f"{n} {what}" for what, n in counts.items() if n or what == "whole")
    state = f"stages: {state}; {len(found.damaged)} faults"
    say(f"{found.out}: {state}; "
        + ("nothing to do" if found.well else "the same command as before makes what is lacking"))
