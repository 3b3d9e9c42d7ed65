"""Every wrong use of the command is one sentence and status 2; no terminal breaks its output."""

import dataclasses
import errno
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer.main

from planearly import __version__, api, cli, files, methods
from planearly.errors import UserError

VERBS = typer.main.get_command(cli.app).commands
FUNCTIONS = {command.name or command.callback.__name__: command.callback
             for command in cli.app.registered_commands}
INSTALLED = Path(sys.executable).with_name("planearly")


def options(verb):
    """Options of a verb that take a number; those that it hides are not a user's."""
    hints = typing.get_type_hints(FUNCTIONS[verb])
    return [one.opts[-1] for one in VERBS[verb].params
            if one.param_type_name == "option" and not one.hidden
            and {int, float} & {hints.get(one.name), *typing.get_args(hints.get(one.name))}]


def told(capsys, *words, status=2):
    """What the command said of a wrong use: one sentence on standard error alone."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    said = capsys.readouterr()
    assert ended.value.code == status and said.out == ""
    assert said.err.startswith("planearly: ") and said.err.count("\n") == 1, said.err
    return said.err


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_is_one_sentence(verb, capsys):
    said = told(capsys, verb, "--wrongly-named")
    assert f"planearly {verb} has no option '--wrongly-named'" in said
    told(capsys, verb, "-q")


@pytest.mark.parametrize("verb", [v for v in VERBS if any(p.required for p in VERBS[v].params)])
def test_a_missing_argument_tells_the_usage(verb, capsys):
    first = next(p for p in VERBS[verb].params if p.required)
    said = told(capsys, verb)
    assert f"planearly {verb} needs {first.name.upper()}" in said
    assert f"usage: planearly {verb} {first.name.upper()}" in said


@pytest.mark.parametrize(("verb", "option"), [(v, o) for v in VERBS for o in options(v)])
def test_a_wrong_type_is_one_sentence(verb, option, capsys):
    arguments = ["x" for p in VERBS[verb].params if p.required]
    assert f"{option}: give a " in told(capsys, verb, *arguments, option, "many")
    assert f"'{option}' requires an argument" in told(capsys, verb, *arguments, option)


def test_there_are_such_options():
    assert {("study", "--workers"), ("generate", "--temperature"), ("plan", "--devices")} <= {
        (verb, option) for verb in VERBS for option in options(verb)}


@pytest.mark.parametrize("verb", VERBS)
def test_a_misspelt_verb_names_the_nearest(verb, capsys):
    assert f"did you mean: planearly {verb}\n" in told(capsys, verb + "x", "demo")


@pytest.mark.parametrize(("words", "sentence"), [
    (["demo"], "did you mean: planearly run demo"),
    (["zzzz"], "the verbs are run, study"),
    (["--zzzz"], "planearly has no option '--zzzz'"),
    (["run", "nanno"], "did you mean 'nano'?"),
    (["run", "context=3"], "name the recipe before it"),
    (["run", "demo", "nonsense"], "key=value"),
    (["run", "demo", "--context=3"], "recipe keys are written without dashes: context=VALUE"),
    (["run", "demo", "--finetun.lr-scale", "3"], "without dashes: finetune.lr_scale=VALUE"),
    (["generate", "m", "-5 degrees"], "a text that begins with a dash goes after '--'"),
    (["generate", "m", "p", "--token", "3"], "did you mean '--tokens'?"),
    (["study", "demo", "--workers", "0"], "--workers: "),
    (["generate", "m", "p", "--seed", str(2**70)], "--seed: "),
    (["plan", "--device", "a100", "--inference-speed", "nan"], "is no speed of a model"),
    (["plan", "--device", "a100", "--inference-speed", "1e-300"], "is no speed of a model"),
    (["run", "a\nb\x1b[31m"], "there is no recipe 'a\\nb\\x1b[31m'"),
    *[([*words, "--out", "s3://b/run"], "cannot write to s3://: give a folder of this machine")
      for words in (["study", "demo"], ["plan"])],
    (["run", "demo", "--out", "foo://b/run"], "'foo://b/run': foo:// is not known"),
    (["run", "demo", "--to", "models"], "'models' is no URL of a store, as s3://bucket/models"),
    (["push", "m", "foo://a/b"], "m is neither a model folder nor a bundle"),
    (["gguf", "a", "b"], "unexpected extra argument"),
    (["recipes", "--reference=yes"], "does not take a value"),
])
def test_the_nearest_right_use_is_named(words, sentence, capsys):
    assert sentence in told(capsys, *words)


def test_a_file_for_a_folder_and_a_folder_for_a_file_are_told_apart(tmp_path, capsys):
    file = tmp_path / "file.json"
    file.write_text("x")
    assert f"{file} is no folder: give a model folder" in told(capsys, "generate", str(file), "a")
    folder = tmp_path / "folder.json"
    folder.mkdir()
    assert f"{folder} is a folder: name a file" in told(capsys, "study", str(folder), "--report")


PLAN = ["plan", "--inference-params", "126M", "--generic-tokens", "1B", "--spec-tokens", "1M"]


@pytest.mark.parametrize(("words", "what"), [
    (["cluster", "nano", "--share"], "a bundle of clusters"),
    (["weigh", "nano", "--share"], "a histogram"), ([*PLAN, "--html"], "a page of planearly")])
def test_what_is_something_else_is_not_replaced(words, what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for place in ("mine.txt", "mine/file"):
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).write_text("my work")
        said = told(capsys, *words, place)
        assert f"{place} is there already and is not {what}, so it is not replaced" in said
        assert Path(place).read_text() == "my work"
    for place in ("mine", ".", "/"):
        said = told(capsys, *words, place)
        assert f"{place} is " in said and (what in said)
    assert Path("mine/file").read_text() == "my work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine.txt"]


def test_a_plan_leaves_recipes_of_others_alone(tmp_path, capsys):
    out = tmp_path / "plan"
    for _ in range(2):  # its own are replaced
        cli.main([*PLAN, "--out", str(out)])
    capsys.readouterr()
    mine = max(out.glob("slm*.yaml"))
    mine.write_text("name: mine\n")
    said = told(capsys, *PLAN, "--out", str(out))
    assert f"{mine} is there already and is not a recipe of a plan" in said
    assert mine.read_text() == "name: mine\n"


def test_a_bundle_is_no_run_folder(tmp_path, capsys):
    for name in ("bundle.json", "recipe.yaml"):
        (tmp_path / name).write_text("{}")
    for verb in ("doctor", "export"):
        assert "is not a run folder: it is a bundle" in told(capsys, verb, str(tmp_path))


def test_a_store_without_the_corpus_is_told_before_anything_is_written(tmp_path, memory, capsys):
    for setting in (f"generic=[{memory}/none]", f"domains=[{memory}/*/law]", "generic=[foo://a]",
                    f"domains_root={memory}/none"):
        for verb, recipe in (("run", "nano"), ("study", "study-smoke")):
            said = told(capsys, verb, recipe, setting, "--out", str(tmp_path / "run"))
            assert "does not exist: check the b" in said or "foo:// is not known" in said
    assert not list(tmp_path.iterdir())


def test_a_study_without_a_grid_leaves_a_folder_alone(tmp_path, capsys):
    for words in ([], ["--report"]):
        said = told(capsys, "study", "demo", "--out", str(tmp_path / "run"), *words)
        assert "no 'study.grid'" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--html", "page.html"], ["--domains", "3", "--out", "plans"]])
def test_a_plan_of_a_recipe_does_not_pass_over_options_in_silence(words, tmp_path, capsys,
                                                                  monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = told(capsys, "plan", "demo", *words)
    assert words[0] in said and "--device and --json alone" in said
    with pytest.raises(UserError, match="leave them out"):
        api.plan("demo", "plans")
    assert not list(tmp_path.iterdir())


def test_no_arguments_print_the_help(capsys):
    cli.main([])
    assert "Usage: planearly" in capsys.readouterr().out


def test_the_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"planearly {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    cli.main([verb, "--help"])
    assert VERBS[verb].help.split(".")[0][:20] in capsys.readouterr().out


@pytest.mark.parametrize(("verb", "default"), [
    ("run", "runs/NAME"), ("study", "one, or one per GPU"), ("plan", "the number of --spec-tokens"),
    ("plan", "as the amounts say"), ("calibrate", "on a GPU slm-126m")])
def test_the_help_tells_defaults_that_are_no_values(verb, default, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    cli.main([verb, "--help"])
    assert default in capsys.readouterr().out


def test_the_shell_completes_recipes_and_keys():
    from planearly import usage

    assert usage.recipes("study-n") == ["study-nano"]
    assert usage.settings("finetune.lr") == ["finetune.lr_scale="]


@pytest.mark.parametrize(("error", "sentence"), [
    (OSError(errno.ENOENT, "No such file or directory", "gone"), "not exist, check the path"),
    (OSError(errno.EISDIR, "Is a directory", "folder"), "cannot read folder (Is a directory)"),
    (OSError(errno.ENOSPC, "No space left on device", "big"), "the disk is full while writing big"),
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    (OSError(errno.EROFS, "Read-only file system", "x/y"), "cannot write x/y (Read-only"),
    (OSError(errno.EACCES, "Permission denied", "nowhere/new"), "cannot write nowhere/new"),
    (OSError(errno.EMFILE, "Too many open files"), "the system refused: Too many open files"),
])
def test_a_failure_of_the_file_system_says_what_was_tried(error, sentence, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert sentence in told(capsys, "run", "demo")


def test_a_file_without_the_right_to_read_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("x")
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "secret"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    assert isinstance(files.file_error(error), UserError)
    assert "cannot read" in str(files.file_error(error))
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    assert "cannot write" in str(files.file_error(error))


def test_an_interrupt_says_that_the_command_continues(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert "the same command continues from here" in told(capsys, "run", "demo", status=130)


def test_windows_is_refused_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("planearly.usage.WINDOWS", True)
    assert "WSL 2" in told(capsys, "recipes")


def shell(command, **environment):
    return subprocess.run(["bash", "-o", "pipefail", "-c", f"'{sys.executable}' -m planearly.cli "
                           f"{command}"], capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})


@pytest.mark.parametrize("words", [["recipes"], ["--help"]])
def test_a_pipe_that_is_closed_early_is_quiet(words):
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-m", "planearly.cli", *words], stdout=writes,
                          stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert done.stderr == "" and done.returncode in (1, 141)  # 1: the library of tables noticed


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
def test_a_terminal_of_ascii_shows_everything(environment, tmp_path):
    (tmp_path / "new.yaml").write_text("naïve: 1\n", "utf-8")
    done = shell(f"run {tmp_path / 'new.yaml'}", **environment)
    assert done.returncode == 2 and "unknown recipe key 'na\\xefve'" in done.stderr
    assert shell("--help", **environment).returncode == 0


@pytest.mark.skipif(not INSTALLED.exists(), reason="the command is not installed")
def test_the_installed_command():
    done = subprocess.run([INSTALLED, "runn", "demo"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "planearly: there is no verb 'runn'; did you mean: planearly run\n"


def test_a_document_with_an_equals_sign_is_no_setting(tmp_path, monkeypatch):
    from planearly.usage import names_documents

    monkeypatch.chdir(tmp_path)
    for name in ("a=b.jsonl", "spec_tokens=5k", "x=1 y=2.txt"):
        (tmp_path / name).touch()
    assert names_documents("a=b.jsonl") and names_documents(str(tmp_path / "a=b.jsonl"))
    assert names_documents("a=*.jsonl") and names_documents("./spec_tokens=5k") and names_documents("hf://x/y?z=1")
    assert not names_documents("spec_tokens=5k")  # a recipe key stays one
    assert not names_documents("finetune.max_epochs=2") and not names_documents("contxt=3")


def test_an_expert_alone_is_of_the_tables_mixture(monkeypatch):
    row = methods.TABLE["slm-mix"]
    monkeypatch.setattr(methods, "TABLE", {"other": dataclasses.replace(row, name="other")})
    asked = []
    monkeypatch.setattr(cli, "_run", lambda recipe, settings, *rest, **more: asked.extend(settings))
    cli.main(["pretrain", "nano", "--expert", "1"])
    assert asked == ["mixture.expert=1", "methods=[other]"]
