"""k-means: planearly beside faiss and scikit-learn, same points, same iterations, one run.

    python benchmarks/kmeans.py --json [--points FILE.npy] [--n 200000] [--k 1024]

Points are clustered random unit vectors, or real embeddings given as a float array. The last line
is one JSON object: seconds of `ours` and of the faster `peer`, and the ratio of inertias.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from planearly.cluster import kmeans
from planearly.files import read_array


def random_points(n: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors around 2,000 centres of unequal size, with as much noise as signal."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((2000, dim)).astype(np.float32)
    share = rng.dirichlet(np.full(2000, 2.0))
    points = centres[rng.choice(2000, n, p=share)]
    points += rng.standard_normal((n, dim)).astype(np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def ours(points: np.ndarray, k: int, iterations: int) -> np.ndarray:
    return kmeans.fit(points, k, iterations=iterations, tolerance=-1, sample_per_centroid=10**9)


def faiss(points: np.ndarray, k: int, iterations: int) -> np.ndarray:
    from faiss import Kmeans

    model = Kmeans(points.shape[1], k, niter=iterations, spherical=True, seed=0,
                   max_points_per_centroid=10**9)
    model.train(points)
    return model.centroids


def sklearn(points: np.ndarray, k: int, iterations: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    model = KMeans(k, init="random", n_init=1, max_iter=iterations, tol=0, random_state=0)
    centres = model.fit(points).cluster_centers_
    return centres / np.linalg.norm(centres, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="last line is a JSON object")
    parser.add_argument("--points", type=Path, help="a .npy of embeddings instead of random points")
    parser.add_argument("--n", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1, help="the best of so many is reported")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if arguments.points:
        points = np.array(read_array(arguments.points)[: arguments.n], dtype=np.float32)
        points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    else:
        points = random_points(arguments.n, arguments.dim, seed=0)
    methods: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
        "planearly": ours, "faiss": faiss, "scikit-learn": sklearn,
    }
    for method in methods.values():  # libraries load and threads start outside the clock
        method(points[:2048], 16, 2)
    seconds: dict[str, float] = {}
    inertia: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name, method in methods.items():
            began = time.perf_counter()
            centroids = method(points, arguments.k, arguments.iterations)
            spent = time.perf_counter() - began
            seconds[name] = min(spent, seconds.get(name, spent))
            nearest = kmeans.assign(points, centroids)
            inertia[name] = float((1 - (points * centroids[nearest]).sum(1)).mean())
            print(f"{name:14} {spent:7.2f} s   inertia {inertia[name]:.5f}", flush=True)
    peer = min(("faiss", "scikit-learn"), key=lambda name: seconds[name])
    if arguments.json:
        print(json.dumps({
            "what": f"seconds of spherical k-means, n={len(points)} dim={points.shape[1]} "
                    f"k={arguments.k} iterations={arguments.iterations}",
            "ours": seconds["planearly"], "peer": seconds[peer], "peer_name": peer,
            "inertia_ratio": inertia["planearly"] / inertia[peer],
            "seconds": seconds, "inertia": inertia, "threads": torch.get_num_threads(),
        }))


if __name__ == "__main__":
    main()
