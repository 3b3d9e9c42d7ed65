"""A run folder in a store, of which this machine has a copy of what it needs, and works in it.

A stage that is finished in the store is fetched when a run asks for it; one that is finished here
is sent, its manifest last. Of a training in progress the checkpoint is sent now and then, so that
another machine goes on from it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from planearly import storage
from planearly.errors import UserError
from planearly.files import cache_folder, digest
from planearly.progress import say
from planearly.stages.manifest import MANIFEST
from planearly.stages.noted import PAGE, RECIPE, RESULTS
from planearly.train.loop import CHECKPOINT, FINAL, OUTCOME

_OF_RUN = (".hub.json", RECIPE, PAGE, RESULTS)
_SECONDS = 600.0
"""Between two times that the checkpoint of a training is sent."""
_TRAINING = ("pretrain", "specialize")
_ONE_BY_ONE = ".safetensors"
"""Files of this ending are never changed, only replaced; others may be written to."""


class Mirror:
    """The run folder at ``url``; ``folder`` is where it is worked on."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.folder = (cache_folder() / "runs" / digest(self.url)[:16]
                       / self.url.rpartition("/")[2])
        self._there: dict[str, storage.Entry] = {}
        self._kept: set[Path] = set()

    def open(self) -> None:
        """Look what the store has, and take what belongs to no stage.

        Raises:
            UserError: the store cannot be read.
        """
        self._there = storage.tree(self.url)
        say(f"works in {self.folder}, a copy of what it needs of {self.url}")
        storage.fetch(self.url, {self.folder / name: self._there[name] for name in _OF_RUN
                                 if name in self._there and not (self.folder / name).exists()})

    def close(self) -> None:
        """Send what belongs to no stage."""
        storage.publish({name: self.folder / name for name in _OF_RUN
                         if (self.folder / name).is_file()}, self.url)

    def take(self, stage: Path) -> bool:
        """Whether a stage is finished in the store; then it is here as well."""
        found = self._files(stage)
        if MANIFEST not in found:
            return False
        fetched = stage.with_name(f".{stage.name}.fetched")  # what lacks in it is fetched later
        storage.fetch(self._place(stage), {fetched / name: file for name, file in found.items()})
        shutil.rmtree(stage, ignore_errors=True)  # an interrupted one of this machine
        os.replace(fetched, stage)
        return True

    def keep(self, stage: Path) -> None:
        """Send a finished stage, unless the store has it."""
        if stage not in self._kept and MANIFEST not in self._files(stage):
            storage.publish({path.relative_to(stage).as_posix(): path
                             for path in sorted(stage.rglob("*")) if path.is_file()},
                            self._place(stage), MANIFEST)
        self._kept.add(stage)

    @contextlib.contextmanager
    def following(self, stage: Path) -> Iterator[None]:
        """While a stage is made here: go on from the checkpoint that the store has, if there is
        nothing here, and send the one that is here now and then."""
        if stage.relative_to(self.folder).parts[0] not in _TRAINING:
            yield
            return
        if not any(stage.iterdir()):
            storage.fetch(self._place(stage), {
                stage / name: file for name, file in self._files(stage).items()})
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(_SECONDS):
                try:
                    self._send_checkpoint(stage)
                except UserError as error:
                    say(f"the checkpoint of {stage.name} could not be sent: {error}")

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _send_checkpoint(self, stage: Path) -> None:
        """Send a training's files as they are now: the checkpoint as of a moment before the others,
        which may be ahead of it and never behind, and after them."""
        now = stage / ".sending.tmp"
        shutil.rmtree(now, ignore_errors=True)
        now.mkdir()
        try:
            names = [path.name for path in stage.iterdir() if path.is_file()
                     and path.name[0] != "." and path.name not in (FINAL, OUTCOME)]
            names.sort(key=lambda name: name != CHECKPOINT)
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    if name.endswith(_ONE_BY_ONE):
                        os.link(stage / name, now / name)
                    else:
                        shutil.copyfile(stage / name, now / name)
            storage.publish({path.name: path for path in now.iterdir()}, self._place(stage),
                            CHECKPOINT, stays=True, quiet=True)
        finally:
            shutil.rmtree(now, ignore_errors=True)

    def _files(self, stage: Path) -> dict[str, storage.Entry]:
        """What the store had of a stage when the run began."""
        begin = f"{stage.relative_to(self.folder).as_posix()}/"
        return {name.removeprefix(begin): file for name, file in self._there.items()
                if name.startswith(begin) and not name.endswith(f"/{storage.RECORD}")}

    def _place(self, stage: Path) -> str:
        return storage.join(self.url, stage.relative_to(self.folder).as_posix())
