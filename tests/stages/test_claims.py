"""Tasks that are put off while another process makes what they need."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from planearly.stages.claims import Busy, in_turns


def tasks(done: set[str], needs: dict[str, str]) -> list[Callable[[], str]]:
    def task(name: str, need: str) -> Callable[[], str]:
        def made() -> str:
            if need and need not in done:
                raise Busy(need)
            done.add(name)
            return name.upper()
        return made

    return [task(name, need) for name, need in needs.items()]


def test_a_task_that_waits_is_put_off_while_there_are_others() -> None:
    pauses: list[str] = []

    def pause(busy: Busy) -> None:
        pauses.append(str(busy))
        done.add("z")  # another process has made it

    done: set[str] = set()
    made = in_turns(tasks(done, {"a": "d", "b": "z", "c": "", "d": ""}), pause)
    assert list(made) == [(2, "C"), (3, "D"), (0, "A"), (1, "B")] and pauses == ["z"]


def test_who_does_not_pause_is_told_at_once() -> None:
    def refuse(busy: Busy) -> None:
        raise busy

    made: list[tuple[int, str]] = []
    with pytest.raises(Busy, match="z"):
        for each in in_turns(tasks(set(), {"a": "z", "b": ""}), refuse):
            made.append(each)
    assert made == [(1, "B")]
