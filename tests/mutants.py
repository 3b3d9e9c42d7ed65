"""Change one thing in a module, run its tests, and see whether they notice; again and again.

    python tests/mutants.py cluster/kmeans model/loss:model/test_attention --sample 60

Of all mutants that cosmic-ray makes of a module (an operator exchanged, a number moved by one, a
condition turned, ...) a random sample is tried, each against the tests that mirror the module, or
those named behind a colon, between commas; slow tests are left out. Mutants that differ in
annotations alone are none. What survives is printed as a difference.

Needs ``pip install cosmic-ray`` and a system that can fork: the libraries are imported once, and
every mutant is a forked process in which the module is compiled from the changed source. Processes
that a test spawns have the module as it is.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.abc
import importlib.machinery
import itertools
import os
import random
import resource
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEFOREHAND = ("numpy", "scipy.stats", "torch", "torch._dynamo", "transformers", "tokenizers",
              "safetensors.torch", "pyarrow", "regex", "hypothesis", "matplotlib.pyplot", "pytest")


def mutants(source: str, order: random.Random) -> Iterator[str]:
    """Every changed source that may act differently, once, in a random order."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    nodes = list(ast_nodes(get_ast(source)))
    operators = [kind() for kind in map(plugins.get_operator, plugins.operator_names())
                 if not kind.arguments()]
    places = [(operator, place) for operator in operators for place in range(
        sum(len(list(operator.mutation_positions(node))) for node in nodes))]
    order.shuffle(places)
    seen = {acting(source)}
    for operator, place in places:
        changed = mutate_code(source, operator, place)
        acts = acting(changed) if changed else None
        if acts and acts not in seen:
            seen.add(acts)
            yield changed


class _Annotations(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant("")
        return self.generic_visit(node)


def acting(source: str) -> str | None:
    """A module without its annotations; None: no Python."""
    try:
        return ast.dump(_Annotations().visit(ast.parse(source)))
    except (SyntaxError, ValueError):
        return None


class Changed(importlib.machinery.SourceFileLoader, importlib.abc.MetaPathFinder):
    """Finds and loads one module from a changed source."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def find_spec(self, fullname: str, path: object, target: object = None):
        if fullname == self.name:
            return importlib.machinery.ModuleSpec(fullname, self, origin=self.path)
        return None

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def survives(name: str, path: Path, source: str, tests: list[str],
             seconds: float) -> tuple[bool, float]:
    """Whether the tests pass with the changed module, and the processor's seconds they took.

    They fail after so many of these, or five times as many on the clock.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            sink = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(sink, stream)
            spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            resource.setrlimit(resource.RLIMIT_CPU, (int(spent + seconds) + 1,) * 2)
            import pytest
            sys.meta_path.insert(0, Changed(name, str(path), source))
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow",
                                      *tests]))
        finally:
            os._exit(status)
    until = time.monotonic() + 5 * seconds
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return status == 0, used.ru_utime + used.ru_stime
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="+", help="as cluster/kmeans, or MODULE:TESTS")
    parser.add_argument("--sample", type=int, default=60, help="mutants of each module")
    parser.add_argument("--minutes", type=float, default=10, help="for each module, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    for library in BEFOREHAND:
        __import__(library)
    for module, _, named in (word.partition(":") for word in given.modules):
        place, began = ROOT / "src" / "planearly" / f"{module}.py", time.monotonic()
        name = "planearly." + module.replace("/", ".")
        tests = [f"tests/{test}.py" for test in
                 (named or f"{Path(module).parent}/test_{place.stem}").split(",")]
        source = place.read_text("utf-8")
        passes, seconds = survives(name, place, source, tests, 600)
        if not passes:
            print(f"{' '.join(tests)} fail without a change of {module}", flush=True)
            continue
        alive, tried = 0, 0
        for changed in itertools.islice(mutants(source, random.Random(given.seed)), given.sample):
            if time.monotonic() - began > 60 * given.minutes:
                break
            tried += 1
            if survives(name, place, changed, tests, 5 * seconds + 10)[0]:
                alive += 1
                print("".join(line + "\n" for line in difflib.unified_diff(
                    source.splitlines(), changed.splitlines(), f"{module}.py", lineterm="", n=0)
                    if not line.startswith(("---", "+++ "))), flush=True)
        print(f"{module}: {alive} of {tried} survived ({time.monotonic() - began:.0f} s; "
              f"the tests take {seconds:.1f})\n", flush=True)


if __name__ == "__main__":
    main()
