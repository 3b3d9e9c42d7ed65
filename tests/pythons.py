"""Test planearly on several Pythons, with the lowest and the newest packages that it allows.

    python tests/pythons.py lowest newest --pythons 3.11 3.13

Every pair gets an environment of its own, build/pythons/PYTHON-PACKAGES, and runs TESTS there; an
environment whose tests passed is removed. A Python that is not on this machine is skipped.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("hub", "lora")
TESTS = ("test_layers.py", "test_config.py", "test_api.py", "data/test_readers.py",
         "data/test_tokenizer.py", "data/test_hub.py", "data/test_corpora.py",
         "model/test_outside.py", "model/test_lora.py", "train/test_optim.py",
         "train/test_track.py", "export", "test_storage.py", "test_published.py")
"""What depends on the versions of others most; slow tests are left out."""
RUN = "stages/test_checkpoint.py::test_an_open_model_from_documents_to_an_exported_folder[qwen3]"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", nargs="+", choices=("lowest", "newest"))
    parser.add_argument("--pythons", nargs="+", default=["3.11", "3.13"], metavar="3.N")
    parser.add_argument("--torch", metavar="BUILD", help="of PyTorch's index, such as cpu")
    parser.add_argument("--keep", action="store_true", help="environments that passed, too")
    given = parser.parse_args()
    told, failed = [], False
    for python in given.pythons:
        found = interpreter(python)
        for packages in given.packages:
            began, what = time.monotonic(), f"Python {python}, {packages} packages"
            if found is None:
                told.append(f"{what}: skipped, there is no python{python} on this machine")
                continue
            print(f"== {what}", flush=True)
            place = ROOT / "build" / "pythons" / f"{python}-{packages}"
            passed = tested(found, place, packages, given.torch)
            if passed and not given.keep:
                shutil.rmtree(place)
            failed = failed or not passed
            minutes = (time.monotonic() - began) / 60
            told.append(f"{what}: {'passed' if passed else 'failed'}, {minutes:.1f} min")
    print(*told, sep="\n")
    return int(failed)


def interpreter(python: str) -> str | None:
    """The command of a Python such as 3.13: on the path, or one of pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    kept = sorted((root / "versions").glob(f"{python}.*/bin/python"))
    for command in (shutil.which(f"python{python}"), *map(str, reversed(kept))):
        # what pyenv puts on the path is there, and fails, for versions that are not chosen
        if command and not subprocess.run([command, "-c", ""], capture_output=True).returncode:
            return command
    return None


def tested(python: str, place: Path, packages: str, torch: str | None) -> bool:
    """Install into an environment and run the tests there; whether all of it passed."""
    def succeeds(*words: str, **environment: str) -> bool:
        command = [str(place / "bin" / "python"), "-m", *words]
        return not subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode

    subprocess.run([python, "-m", "venv", place], check=True)
    words = ["install", "--quiet", "--upgrade", "-e", f".[{','.join(EXTRAS)},dev]"]
    if packages == "lowest":
        limits = place / "lowest.txt"
        limits.write_text("\n".join(lowest()), "utf-8")
        words += ["-c", str(limits)]
    if torch:
        words += ["--extra-index-url", f"https://download.pytorch.org/whl/{torch}"]
    return (succeeds("pip", "install", "--quiet", "--upgrade", "pip")
            and succeeds("pip", *words)
            and succeeds("pytest", "-n", "2", "--dist", "loadfile", "-m", "not slow",
                         *(f"tests/{name}" for name in TESTS), OMP_NUM_THREADS="1")
            and succeeds("pytest", f"tests/{RUN}", OMP_NUM_THREADS="1"))


def lowest() -> list[str]:
    """The lowest version of each package, and the pinned one of each tool, as pip's constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(each for name in EXTRAS for each in extras[name])]
    tools = {re.split(r"[^\w-]", tool, maxsplit=1)[0].lower() for tool in extras["dev"]}
    pinned = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [*(each.replace(">=", "==", 1) for each in needed),
            *(line for line in pinned if line.partition("==")[0].lower() in tools)]


if __name__ == "__main__":
    sys.exit(main())
