"""A run folder in a store, of which this machine has a copy of what it needs, and works in it.

A stage that is finished in the store is fetched when a run asks for it; one that is finished here
is sent, its manifest last. Of a training in progress the checkpoint is sent now and then, so that
another machine goes on from it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from planearly import storage
from planearly.errors import UserError
from planearly.files import atomic_write, cache_folder, digest, read_object, write_json
from planearly.progress import say
from planearly.stages.manifest import MANIFEST
from planearly.stages.noted import PAGE, RECIPE, RESULTS
from planearly.train import state
from planearly.train.loop import CHECKPOINT, FINAL, OUTCOME

T = TypeVar("T")

_OF_RUN = (".hub.json", RECIPE, PAGE, RESULTS)
_AGREED = ".store.json"
"""File of the copy: versions in the store of what belongs to no stage, when both last agreed."""
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
        """Look what the store has, and take what belongs to no stage, unless what lies here is the
        same or was made of it since.

        Raises:
            UserError: the store cannot be read.
        """
        place = self.folder / _AGREED
        agreed: dict[str, Any] = {}
        with contextlib.suppress(UserError):  # without it, or where it is damaged, all is taken
            agreed = read_object(place)
        self._there = storage.tree(self.url)
        say(f"works in {self.folder}, a copy of what it needs of {self.url}")
        for name in _OF_RUN:
            file, ours = self._there.get(name), self.folder / name
            if file and not (ours.is_file() and agreed.get(name) == file.version):
                with atomic_write(ours) as out, storage.reader(file) as source:
                    shutil.copyfileobj(source, out)
                agreed[name] = file.version
        write_json(place, agreed)

    def close(self) -> None:
        """Send what belongs to no stage."""
        storage.publish({name: self.folder / name for name in _OF_RUN
                         if (self.folder / name).is_file()}, self.url)
        there = {name: storage.look(storage.join(self.url, name)) for name in _OF_RUN}
        write_json(self.folder / _AGREED, {
            name: file.version for name, file in there.items() if file})

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
        """While a stage is made here: go on from the checkpoint that the store has, if it is later
        than what is here, and send the one that is here now and then."""
        if stage.relative_to(self.folder).parts[0] not in _TRAINING:
            yield
            return
        self._take_later(stage)
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

    def _take_later(self, stage: Path) -> None:
        """Take what the store has of a training, if that got further there than here."""
        there = self._files(stage)
        here = {path.name: path for path in stage.iterdir()}
        if _reached(there, storage.reader) <= _reached(here, lambda path: path.open("rb")):
            return
        fetched = stage.with_name(f".{stage.name}.checkpoint")  # all of it, or nothing, is taken
        shutil.rmtree(fetched, ignore_errors=True)  # the store may have had another one then
        storage.fetch(self._place(stage), {fetched / name: file for name, file in there.items()})
        # others may be ahead of a checkpoint, never behind
        for name in sorted(there, key=lambda name: name == CHECKPOINT):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(fetched / name, stage / name)
        shutil.rmtree(fetched)

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


def _reached(files: Mapping[str, T], opened: Callable[[T], IO[bytes]]) -> float:
    """How far a training got of which these files are left: one more than the steps of its
    checkpoint, 0 without one, infinite when it is done; below 0 where there is nothing."""
    if OUTCOME in files:
        return math.inf
    if CHECKPOINT in files:
        with opened(files[CHECKPOINT]) as handle:
            return 1.0 + state.steps(handle)
    return 0.0 if files else -1.0
