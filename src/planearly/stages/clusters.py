"""From token datasets to what the sampler draws by: embeddings, clusters, rows, weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from planearly.cluster import embed, histogram, importance, kmeans
from planearly.cluster.assign import assign_windows
from planearly.cluster.blends import random_histograms
from planearly.data.dataset import TokenDataset
from planearly.data.pack import Rows, pack_corpus
from planearly.data.sample import Sampler
from planearly.errors import UserError
from planearly.export import bundle as bundles
from planearly.files import digest, read_array, write_array, write_chunks, write_json
from planearly.progress import say
from planearly.stages import corpus
from planearly.stages.folder import Run, once
from planearly.stages.manifest import facts
from planearly.train.steps import generic_rows

BLENDS = 4096
"""Random histograms over clusters that a projected network is trained on, over and over."""
_WINDOWS = 1 << 20  # whose coarser cluster is written at once


def finest(run: Run) -> int:
    """The largest number of clusters of the recipe; rows of methods without weights use it."""
    return max(run.recipe.cluster.k)


@once
def embedder(run: Run) -> embed.Embedder:
    """The recipe's embedder; with a bundle it has to be the one of the bundle's clusters."""
    recipe = run.recipe
    if not recipe.bundle:
        return embed.load_embedder(recipe.cluster.embedder)
    return bundles.fitting_embedder(
        recipe.bundle, facts(corpus.bundle(run))["embedder"], recipe.cluster.embedder)


@once
def embeddings(run: Run) -> Path:
    """Embeddings of the generic corpus's windows: float16 [n, dim] in ``blocks``."""
    everything = corpus.generic(run)
    by = embedder(run)

    def build(folder: Path) -> dict[str, Any]:
        embed.embed_dataset(TokenDataset(everything), corpus.tokenizer_of(run), by,
                            folder / "blocks", executor=run.executor)
        return {"embedder": {"name": by.name, "digest": by.digest}}

    settings = {"embedder": by.name, "digest": by.digest}
    return run.stage("embeddings", settings, {"generic": everything}, build)


@once
def clusters(run: Run) -> Path:
    """Centroids and assignment of the generic corpus at every k.

    ``centroids-K.npy`` float32 [K, dim]; ``assignment-K.npy`` int32 [n_windows]; when nested,
    ``parent-K.npy`` int32 [K], the cluster of the next coarser level.
    """
    recipe = run.recipe
    if recipe.bundle:
        return _clusters_of(run)
    embedded = embeddings(run)
    everything = corpus.generic(run)
    ks = sorted(set(recipe.cluster.k), reverse=True)
    settings = {**asdict(recipe.cluster), "k": ks, "seed": recipe.seed}

    def build(folder: Path) -> dict[str, Any]:
        points = embed.open_embeddings(embedded / "blocks")
        dataset = TokenDataset(everything)
        if ks[0] > len(points):
            raise UserError(
                f"recipe key 'cluster.k' asks for {ks[0]} clusters of {len(points)} windows: "
                "choose fewer clusters or give more generic text"
            )
        levels = {}
        centroids = assignment = None
        for k in ks:
            file, said = folder / f"centroids-{k}.npy", folder / f"assignment-{k}.npy"
            say(f"clustering {len(points)} windows into {k}")
            if centroids is None or assignment is None or not recipe.cluster.nested:
                centroids = read_array(file) if file.exists() else kmeans.fit(
                    points, k, iterations=recipe.cluster.iterations,
                    sample_per_centroid=recipe.cluster.sample_per_centroid, seed=recipe.seed,
                )
                write_array(file, centroids)
                assignment = assign_windows(embedded / "blocks", file, said, run.executor)
            else:
                finer = len(centroids)
                counts = histogram.counted(assignment, dataset.windows, dataset.context, finer)
                parent = kmeans.nest(centroids, counts, k, seed=recipe.seed)
                centroids = kmeans.merge(centroids, counts, parent, k)
                assignment = _coarser(assignment, parent, said)
                write_array(folder / f"parent-{finer}.npy", parent)
                write_array(file, centroids)
            levels[str(k)] = _summary(dataset, assignment, k)
        return {"levels": levels, "embedder": facts(embedded)["embedder"]}

    return run.stage("clusters", settings, {"embeddings": embedded}, build)


def _coarser(assignment: np.ndarray, parent: np.ndarray, out: Path) -> np.ndarray:
    """Write the parents of the assigned clusters, int32 [n], a block at a time."""
    write_chunks(out, np.dtype("<i4"), assignment.shape, (
        parent[assignment[start:start + _WINDOWS]].astype(np.int32)
        for start in range(0, len(assignment), _WINDOWS)))
    return read_array(out)


def _summary(dataset: TokenDataset, assignment: np.ndarray, k: int) -> dict[str, Any]:
    """The generic histogram over k clusters in figures, which are told."""
    shape = histogram.summary(histogram.counted(assignment, dataset.windows, dataset.context, k))
    say(f"  entropy {shape['entropy']:.2f} nats ({shape['relative_entropy']:.1%} of ln k), "
        f"largest {shape['largest_share']:.1%}, {shape['empty']} empty")
    return shape


def arrays(run: Run) -> tuple[dict[str, np.ndarray], list[int]]:
    """What a bundle tells of the clusters, by name (:mod:`planearly.export.bundle`), and their
    numbers, falling."""
    ks = sorted(set(run.recipe.cluster.k), reverse=True)
    found = {path.stem: read_array(path) for path in clusters(run).glob("*.npy")
             if not path.name.startswith("assignment")}
    return found | {f"rows-{k}": generic_weights(rows(run, k)) for k in ks}, ks


def _clusters_of(run: Run) -> Path:
    """The clustering that the recipe's bundle brings: the finest level and that of the experts, or
    all; and the assignment of the generic corpus, if there is one."""
    source = corpus.bundle(run)
    embedded = embeddings(run) if run.recipe.reads_generic else None

    def build(folder: Path) -> dict[str, Any]:
        if "levels" in bundles.read_info(source / "bundle"):
            for array in (source / "bundle").glob("*.npy"):
                if not array.name.startswith("rows"):
                    shutil.copyfile(array, folder / array.name)
            return {"embedder": facts(source)["embedder"],
                    **({"levels": _assigned(run, embedded, folder)} if embedded else {})}
        brought = bundles.Clusters.load(source / "bundle")
        experts, finer = len(brought.centroids), len(brought.finest)
        write_array(folder / f"centroids-{experts}.npy", brought.centroids)
        if finer > experts:
            write_array(folder / f"centroids-{finer}.npy", brought.finest)
            write_array(folder / f"parent-{finer}.npy", brought.parent)
        return {"embedder": facts(source)["embedder"]}

    return run.stage("clusters", {}, {
        "bundle": source, **({"embeddings": embedded} if embedded else {})}, build)


def _assigned(run: Run, embedded: Path, folder: Path) -> dict[str, Any]:
    """Assign the generic windows to the centroids in a folder at every k; their histograms in
    figures."""
    dataset = TokenDataset(corpus.generic(run))
    return {str(k): _summary(dataset, assignment, k)
            for k, assignment in _levels(run, embedded, folder, folder)}


def _levels(run: Run, embedded: Path, clustered: Path,
            folder: Path) -> Iterator[tuple[int, np.ndarray]]:
    """The clusters, at every k from the finest on, of the windows whose embeddings are in the
    ``blocks`` of a folder; also written to ``folder``."""
    finer, assignment = 0, np.empty(0, np.int32)
    for k in sorted(set(run.recipe.cluster.k), reverse=True):
        file = folder / f"assignment-{k}.npy"
        assignment = _coarser(assignment, read_array(clustered / f"parent-{finer}.npy"), file) \
            if finer and run.recipe.cluster.nested else assign_windows(
                embedded / "blocks", clustered / f"centroids-{k}.npy", file, run.executor)
        yield k, assignment
        finer = k


def lineage(run: Run, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The centroids float32 [K, dim] that windows are assigned by, and the cluster among ``k`` of
    each, int32 [K]: those of the finest level, or, if the recipe does not nest them, of this one.
    """
    clustered = clusters(run)
    levels = sorted({n for n in run.recipe.cluster.k if n >= k}, reverse=True)
    if not run.recipe.cluster.nested:
        levels = [k]
    parent = np.arange(levels[0], dtype=np.int32)
    for finer in levels[:-1]:
        parent = read_array(clustered / f"parent-{finer}.npy")[parent]
    return read_array(clustered / f"centroids-{levels[0]}.npy"), parent


@once
def identity(run: Run, k: int) -> str:
    """Digest of the clusters at ``k``: the embedder, and the centroids that lead to each of them.
    """
    centroids, parent = lineage(run, k)
    return digest([facts(clusters(run))["embedder"]["digest"],
                   np.asarray(centroids, np.float32).tobytes().hex(),
                   np.asarray(parent, np.int32).tobytes().hex()])


@once
def domain_clusters(run: Run, name: str) -> Path:
    """Clusters of a domain's specialization windows: ``assignment-K.npy`` int32 [n_windows].

    Of windows beyond ``spec_tokens`` it is -1: they are not embedded, however large the domain.
    The embedder is that of the clusters, which the stage reads, whatever it is called here.
    """
    source, clustered = corpus.domain(run, name), clusters(run)
    by = embedder(run)
    dataset, used = corpus.specialization_windows(run, name)
    allowed = len(corpus.training_windows(run, name)[1])

    def build(folder: Path) -> None:
        embed.embed_dataset(dataset, corpus.tokenizer_of(run), by, folder / "blocks", used,
                            run.executor)
        for k, assignment in _levels(run, folder, clustered, folder):
            everywhere = np.full(len(dataset), -1, np.int32)
            everywhere[used] = assignment
            write_array(folder / f"assignment-{k}.npy", everywhere)

    settings = {} if len(used) == allowed else {
        "spec_tokens": run.recipe.spec_tokens, "seed": run.recipe.seed}
    return run.stage(f"domain-clusters/{name}", settings,
                     {"domain": source, "clusters": clustered}, build,
                     wider=[{}] if settings else [])


def of_windows(run: Run, dataset: TokenDataset, windows: np.ndarray, k: int,
               folder: Path) -> np.ndarray:
    """The clusters of some windows of a dataset, int32 [n], by embeddings that ``folder`` keeps."""
    embed.embed_dataset(dataset, corpus.tokenizer_of(run), embedder(run), folder / "blocks",
                        windows, run.executor)
    return dict(_levels(run, folder, clusters(run), folder))[k]


def domain_embeddings(run: Run, name: str) -> np.ndarray:
    """Embeddings of a domain's specialization windows, float16 [n, dim], in their order."""
    dataset, used = corpus.specialization_windows(run, name)
    stage = domain_clusters(run, name)
    points = embed.open_embeddings(stage / "blocks")
    if len(points) == len(dataset):  # as all stages of the older layout have them
        return points[used]
    (file, *_) = sorted(stage.glob("assignment-*.npy"))
    embedded = np.flatnonzero(read_array(file) >= 0)
    return points[np.searchsorted(embedded, used)]


@once
def rows(run: Run, k: int) -> Path:
    """The generic corpus packed into rows of one cluster each, at k clusters."""
    clustered = clusters(run)
    settings = {"k": k, "excluded": corpus.kept_digest(run), "seed": run.recipe.seed}

    def build(folder: Path) -> dict[str, Any]:
        return pack(run, clustered / f"assignment-{k}.npy", k, folder)

    return run.stage(f"rows/k{k}", settings, {"clusters": clustered}, build)


def pack(run: Run, groups: Path, n_groups: int, folder: Path) -> dict[str, Any]:
    """Pack the generic corpus by the groups in a file, without what is excluded, into ``folder``.
    """
    packed = pack_corpus(TokenDataset(corpus.generic(run)), groups, corpus.kept(run) /
                         "excluded.npy", n_groups, run.recipe.seed, folder, run.executor)
    return {"rows": len(packed), "fill": packed.fill}


def generic_weights(packed: Path) -> np.ndarray:
    """Weights of plain pretraining: every row alike, so each group by its number of rows."""
    return np.diff(Rows.load(packed).group_offsets).astype(np.float64)


def generic_counts(run: Run, k: int) -> np.ndarray | None:
    """Rows of generic text in each of k clusters, float64 [k]; None where a bundle does not tell.
    """
    if run.recipe.reads_generic:
        return generic_weights(rows(run, k))
    brought = corpus.bundle(run) / "bundle"
    if (told := brought / f"rows-{k}.npy").is_file():
        return read_array(told)
    if not (brought / "counts.npy").is_file():
        return None
    experts = bundles.Clusters.load(brought)
    return experts.counts if len(experts.counts) == k else None


@once
def blends(run: Run, k: int) -> Path:
    """Random histograms over k clusters that a projected network is trained on the blends of.

    ``histograms.npy`` float64 [n, k].
    """
    packed, assigned = rows(run, k), clusters(run)

    def build(folder: Path) -> dict[str, Any]:
        dataset, windows = TokenDataset(corpus.generic(run)), Rows.load(packed).windows
        made = random_histograms(
            read_array(assigned / f"assignment-{k}.npy")[windows],
            np.asarray(dataset.windows["length"][windows], np.float64) / dataset.context,
            dataset.windows["document"][windows], k, BLENDS, run.recipe.seed)
        write_array(folder / "histograms.npy", made)
        entropy = -(made * np.log(np.maximum(made, 1e-300))).sum(1)
        return {"entropy": {"mean": float(entropy.mean()), "least": float(entropy.min()),
                            "most": float(entropy.max())}}

    return run.stage(f"blends/k{k}", {"k": k, "blends": BLENDS, "seed": run.recipe.seed},
                     {"rows": packed, "clusters": assigned}, build)


@once
def importance_weights(run: Run, name: str, k: int | None = None,
                       drawn: int | None = None) -> Path:
    """Cluster weights that make the generic corpus look like a domain (paper, section 3).

    Args:
        k: clusters (default: the recipe's).
        drawn: rows that will be drawn (default: those of the recipe's pretraining).

    ``weights.npy`` float64 [k]; the manifest tells k, the effective sample size, the divergence
    and the expected epochs. All of it is shown before any training.
    """
    recipe = run.recipe
    clustered, given = clusters(run), corpus.histograms(run).get(name)
    mine = received(run, name) if given else domain_clusters(run, name)
    wanted = k or recipe.importance.k
    candidates = [wanted] if wanted else sorted(set(recipe.cluster.k))
    if given and not (candidates := [k for k in candidates if k in given.levels]):
        raise UserError(f"the histogram of '{name}' counts {given.numbers} clusters, and not "
                        f"{wanted or recipe.cluster.k}: set 'importance.k' to one of its numbers, "
                        "or ask its owner for that")
    packed = {k: rows(run, k) for k in candidates}
    draws = drawn or generic_rows(recipe)
    settings = {**asdict(recipe.importance), "k": candidates, "spec_tokens": recipe.spec_tokens,
                "rows": draws, "seed": recipe.seed}

    def build(folder: Path) -> dict[str, Any]:
        scored, counts = {}, {}
        for k in candidates:
            generic = generic_weights(packed[k])
            if given:
                scored[k] = given.smoothed(k, generic, recipe.importance.smoothing)
                counts[k] = np.maximum(given.levels[k].counts, 0)
            else:
                scored[k], counts[k] = smoothed(run, name, k, generic)
        best = max(candidates, key=lambda k: scored[k].gain)
        generic = generic_weights(packed[best]).astype(np.int64)
        parent_file = clustered / f"parent-{best}.npy"
        weights = importance.weigh(
            scored[best].p, generic, draws, recipe.importance.max_epochs,
            parent=read_array(parent_file) if parent_file.exists() else None,
            centroids=read_array(clustered / f"centroids-{best}.npy"),
            realised=lambda w: Sampler(generic, w, sampler_seed(run)).counts(draws),
            context=recipe.context,
        )
        shape = histogram.summary(counts[best])
        say(f"  the domain's entropy over {best} clusters is {shape['entropy']:.2f} nats "
            f"({shape['relative_entropy']:.1%} of ln k)")
        for sentence in importance.explain(weights, warn_epochs=recipe.importance.warn_epochs):
            say(f"  {sentence}")
        write_array(folder / "weights.npy", weights.weights)
        write_array(folder / "domain.npy", scored[best].p)
        details = importance.facts(weights)
        write_json(folder / "clusters.json", details.pop("clusters"))
        windows = round(float(counts[best].sum())) if given \
            else len(corpus.specialization_windows(run, name)[1])
        return {
            "k": best, "tau": scored[best].tau, "windows": windows,
            "gain": {str(k): s.gain for k, s in scored.items()},
            "domain": shape, "weights": details,
        }

    inputs = {"clusters": clustered, "histogram" if given else "domain-clusters": mine,
              **{f"rows-{k}": path for k, path in packed.items()}}
    # version 1 chose among the numbers of clusters by what they are worth with the owner's prior
    version = 2 if given and recipe.importance.smoothing is not None else 1
    return run.stage(f"weights/{name}", settings, inputs, build, version=version)


def smoothed(run: Run, name: str, k: int,
             generic: np.ndarray) -> tuple[histogram.Smoothed, np.ndarray]:
    """A domain's histogram at k clusters, smoothed towards the generic one ``[k]``; and its counts,
    window-equivalents ``[k]``."""
    dataset, used = corpus.specialization_windows(run, name)
    size = np.asarray(dataset.windows["length"][used], np.float64) / dataset.context
    groups = read_array(domain_clusters(run, name) / f"assignment-{k}.npy")[used]
    return histogram.smooth(
        groups, size, generic, tau=run.recipe.importance.smoothing,
        documents=dataset.windows["document"][used]), histogram.histogram(groups, size, k)


@once
def received(run: Run, name: str) -> Path:
    """The histogram that a domain is given by, if it is one of this run's clusters.

    Raises:
        UserError: it is one of other clusters.
    """
    given, clustered = corpus.histograms(run)[name], clusters(run)
    place = corpus.domain_names(run)[name]

    def build(folder: Path) -> None:
        by = facts(clustered)["embedder"]
        if given.embedder["digest"] != by["digest"]:
            raise UserError(f"{place} is a histogram of clusters by the embedder "
                            f"'{given.embedder['name']}', and this run's, '{by['name']}', is "
                            f"another (digests {given.embedder['digest'][:12]} and "
                            f"{by['digest'][:12]}): set 'cluster.embedder' to that one, or give "
                            "its owner these clusters")
        for k in sorted(given.levels.keys() & set(run.recipe.cluster.k)):
            if (digest := given.levels[k].clusters) != identity(run, k):
                raise UserError(f"{place} is a histogram of other {k} clusters than this run's "
                                f"(digests {digest[:12]} and {identity(run, k)[:12]}): give its "
                                "owner these ('planearly cluster --share'), or run on the generic "
                                "corpus, seed and settings that those are of")
        if not given.levels.keys() & set(run.recipe.cluster.k):
            raise UserError(f"{place} is a histogram of {given.numbers} clusters, and 'cluster.k' "
                            f"is {run.recipe.cluster.k}: add that number, or ask its owner for "
                            "another histogram")
        given.save(folder / "histogram.json")

    settings = {"digest": run.file_digests([corpus.histogram_file(run, name)])[0]}
    return run.stage(f"histogram/{name}", settings, {"clusters": clustered}, build)


def counts(run: Run, name: str, k: int) -> np.ndarray:
    """Tokens of a domain in each of k clusters, float64 [k]; of one that is given by a histogram
    with noise, the shares that are made of it.
    """
    given = corpus.histograms(run).get(name)
    if given is None:
        dataset, used = corpus.specialization_windows(run, name)
        groups = read_array(domain_clusters(run, name) / f"assignment-{k}.npy")[used]
        return np.bincount(groups, np.asarray(dataset.windows["length"][used], np.float64), k)
    if given.noise:
        return given.smoothed(k, generic_weights(rows(run, k))).p
    return np.rint(given.levels[k].counts * run.recipe.context)


def sampler_seed(run: Run) -> int:
    """Seed of the order in which pretraining draws rows."""
    return run.recipe.seed * 2 + 1
