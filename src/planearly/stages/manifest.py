"""The manifest of a finished stage: what it was made from, by what, and which files it has."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import planearly
from planearly.errors import UserError
from planearly.files import digest, file_digest, read_json

MANIFEST = "manifest.json"
"""The file of a finished stage that is written last."""


def identity_of(name: str, settings: Mapping[str, Any], inputs: Mapping[str, Path],
              version: int) -> dict[str, Any]:
    """Everything that a stage's result depends on."""
    identity: dict[str, Any] = {
        "stage": name,
        "settings": dict(settings),
        "inputs": {key: facts(path)["fingerprint"] for key, path in sorted(inputs.items())},
    }
    return identity if version == 1 else {**identity, "version": version}


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """The fingerprint that a manifest's own words give.

    Raises:
        KeyError: it lacks what a fingerprint covers.
    """
    covered = {key: manifest[key] for key in ("stage", "settings", "inputs")}
    version = manifest.get("version", 1)
    return digest(covered if version == 1 else {**covered, "version": version})


def contents(folder: Path) -> dict[str, list[Any]]:
    """Size in bytes and SHA-256 of every file of a stage but its manifest, by relative path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, file_digest(path)]
            for path in found}


def facts(stage: Path) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises:
        UserError: it is damaged.
    """
    found = read_json(stage / MANIFEST)
    if not isinstance(found, dict) or not found.keys() >= {"stage", "fingerprint"}:
        raise UserError(f"{stage / MANIFEST} is damaged: remove its folder (rm -r "
                        f"{shlex.quote(str(stage))}), and the same command makes it again")
    return found


def versions() -> dict[str, str]:
    return {"planearly": planearly.__version__, "torch": torch.__version__,
            "python": platform.python_version()}
