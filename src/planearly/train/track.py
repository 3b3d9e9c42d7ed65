"""What ``metrics.jsonl`` gets, sent to TensorBoard, Weights & Biases or Trackio as well.

It is no part of what a stage is made from, and nothing that goes wrong with it stops a training.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from planearly.errors import UserError, brief
from planearly.files import read_object, write_json
from planearly.progress import say


def check(kind: str | None) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        UserError: says how to install it.
    """
    if kind and importlib.util.find_spec(kind) is None:
        raise UserError(f"recipe key 'track' is {kind}, and the package {kind} is not installed: "
                        f"pip install 'planearly[{kind}]', or leave the key out")


@dataclass
class Following:
    """Where the trainings of a run are tracked: the run's folder, and its settings to be shown."""

    kind: str
    out: Path
    config: Mapping[str, Any]
    opened: list[Tracker] = field(default_factory=list)


_following: ContextVar[Following | None] = ContextVar("following", default=None)
_given_up: set[str] = set()


@contextlib.contextmanager
def following(kind: str | None, out: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts, what trainings in folders under ``out`` log goes to a tracker (None: not)."""
    here = Following(kind, out, config) if kind else None
    token = _following.set(here)
    try:
        yield
    finally:
        _following.reset(token)
        for left in here.opened if here else ():  # by trainings that were stopped
            left.close()


def tracker(folder: Path) -> Tracker | None:
    """The tracker of a training in a folder, where one is wanted."""
    here = _following.get()
    if here is None or here.kind in _given_up or here.out not in folder.parents:
        return None
    here.opened.append(Tracker(here, folder))
    return here.opened[-1]


class Sink(Protocol):
    """Where records go."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Sends the records of a training, each once; gives up for this process where it cannot.

    A resumed training logs again what it had logged after its last checkpoint. A note in the run
    folder says how far records were sent, by their kind, since one step may log a loss and a
    validation. The files of TensorBoard are written anew instead.
    """

    def __init__(self, here: Following, folder: Path) -> None:
        self.kind = here.kind
        place = folder.relative_to(here.out)
        self._note = here.out / here.kind / place / "sent.json"
        self._sent: dict[str, Any] = {"id": secrets.token_hex(4), "last": {}}
        self._sink: Sink | None = None
        with self._trying():
            if self.kind == "tensorboard":
                self._sink = TensorBoard(self._note.parent)
                return
            with contextlib.suppress(UserError):  # nothing is sent yet, or the note is damaged
                sent = read_object(self._note, "id", "last")
                self._sent = sent if isinstance(sent["last"], dict) else self._sent
            made = Wandb if self.kind == "wandb" else Trackio
            self._sink = made(here, place.as_posix(), self._sent["id"])

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record of ``metrics.jsonl``, unless it was sent before."""
        step, values = record["step"], {k: v for k, v in record.items() if k != "step"}
        kind = "validation" if "validation" in record else "loss"
        if kind == "validation":  # the rest stands with the loss, of the same step perhaps
            values = {kind: values[kind]}
        if self._sink is None or step <= self._sent["last"].get(kind, -1):
            return
        with self._trying():
            self._sent["last"][kind] = step
            if self.kind != "tensorboard":
                write_json(self._note, self._sent)
            self._sink.log(step, values)

    def close(self) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            with self._trying():
                sink.close()

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
                yield
        except Exception as error:  # whatever such a library and its transport raise
            self._sink = None
            _given_up.add(self.kind)
            say(f"track={self.kind} is given up ({brief(error)}): training goes on, and its "
                "metrics.jsonl has everything")


class TensorBoard:
    """Event files in a folder of the training's own."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, gone on with by its id; its files lie in the run folder."""

    def __init__(self, here: Following, name: str, id: str) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "planearly", group=here.out.resolve().name,
            name=name, id=id, resume="allow", dir=str(here.out), config=dict(here.config),
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True,
                                    init_timeout=60, finish_timeout=60))
        # an axis of our own: theirs only goes forward, and a step may log twice
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if not self._run.offline:
            say(f"  {name} is tracked at {self._run.url}")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio, gone on with by its name."""

    def __init__(self, here: Following, name: str, id: str) -> None:
        import trackio

        self._run = trackio.init("planearly", name=f"{name}.{id}", resume="allow", embed=False,
                                 group=here.out.resolve().name, config=dict(here.config))

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
