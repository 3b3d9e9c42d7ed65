"""What a study is asked: the claims and tables of one question each. Imports study, stages and what
lies below; cli names them."""

from __future__ import annotations

import importlib

from planearly.study.spec import Suite


def suite(name: str) -> Suite:
    """The tables and claims that recipe key ``study.suite`` names."""
    found: Suite = importlib.import_module(f"planearly.studies.{name}").SUITE
    return found
