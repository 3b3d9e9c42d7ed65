"""What a process tells, and what it tells for others."""

from planearly import progress


def test_what_others_write_is_told_here_line_by_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LOOK", 0.01)
    log = tmp_path / "1.log"
    with progress.told_in(log):
        progress.say("before")
        assert not capsys.readouterr().err
    with progress.relayed(tmp_path):
        with open(log, "a") as handle:
            handle.write("one\nhal")
        said = ""
        while "one\n" not in said:
            said += capsys.readouterr().err
        assert said == "before\none\n"
        with progress.told_in(log):
            progress.say("f [of] it")
        (tmp_path / "2.log").write_text("another\n")
        progress.say("own")
    rest = capsys.readouterr().err.splitlines()
    assert sorted(rest) == ["another", "half [of] it", "own"]
    assert (tmp_path / "2.log").read_text() == "another\n"
