"""planearly: which small language model to train for a domain, at what cost, and the training.

An implementation of D. Grangier, A. Katharopoulos, P. Ablin, A. Hannun, *Need a Small Specialized
Language Model? Plan Early!*, arXiv 2402.01093 ("the paper" in every docstring of this package).

:mod:`planearly.api` has the functions; they are here as well, and imported when first used.
"""

from __future__ import annotations

import importlib
import types
from typing import TYPE_CHECKING, Any

from planearly.errors import UserError

if TYPE_CHECKING:
    from planearly.api import evaluate, generate, plan, run, specialize

__all__ = ["UserError", "evaluate", "generate", "plan", "run", "specialize"]
__version__ = "0.1.0"


class _Called(types.ModuleType):
    """A module that is a function of the API too: ``planearly.plan``, ``planearly.evaluate`` and
    ``planearly.generate`` are called as what they are named for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from planearly import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'planearly' has no attribute '{name}'")
    from planearly import api

    return getattr(api, name)


for _name in ("evaluate", "generate", "plan"):
    importlib.import_module(f"planearly.{_name}").__class__ = _Called
