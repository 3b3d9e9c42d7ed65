"""The command: ``planearly VERB``. Results go to standard output, progress to standard error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from planearly.errors import UserError
from planearly.plan.cli import register
from planearly.progress import say

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Which small language model to train for a domain, at what cost, and the training.",
)

RecipeArg = Annotated[str, typer.Argument(help="a recipe file, or a name: demo, nano, ...")]
Settings = Annotated[list[str] | None, typer.Argument(help="recipe keys: key=value")]
Out = Annotated[Path | None, typer.Option(help="run folder [default: runs/NAME]")]


def _run(recipe: str, settings: list[str] | None, out: Path | None, until: str) -> None:
    from planearly import config

    loaded = config.load(recipe, settings or [])
    from planearly.stages import (
        pipeline,  # brings torch: a misspelt key is told without waiting for it
    )

    pipeline.run(loaded, out or Path("runs") / loaded.name, until)


@app.command()
def run(recipe: RecipeArg, settings: Settings = None, out: Out = None) -> None:
    """Do all of it: prepare, cluster, weigh, pretrain, specialize, evaluate, export, report."""
    _run(recipe, settings, out, "report")


@app.command()
def study(
    recipe: RecipeArg, settings: Settings = None, out: Out = None,
    workers: Annotated[int | None, typer.Option(
        help="processes that share the work [default: one, or one per GPU]")] = None,
    only_report: Annotated[bool, typer.Option(
        "--report", help="make nothing: tables and page of what is finished")] = False,
    dry_run: Annotated[bool, typer.Option(
        help="only tell the cells, their sizes and what they will cost")] = False,
    device: Annotated[str, typer.Option(help="of the costs told by --dry-run")] = "here",
    worker: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Compare methods over domains, set sizes and budgets: tables, figures and a page."""
    from planearly import config

    loaded = config.load(recipe, settings or [])
    place = out or Path("runs") / loaded.name
    if dry_run:
        from planearly.study import forecast

        return forecast.show(forecast.forecast(loaded, device))
    from planearly.study import run as studies

    if worker:
        return studies.work(studies.Study(loaded, place, wait=False))
    studies.study(loaded, place, workers, only_report)
    return None


@app.command()
def prepare(recipe: RecipeArg, settings: Settings = None, out: Out = None) -> None:
    """Documents to windows of tokens."""
    _run(recipe, settings, out, "prepare")


@app.command()
def cluster(recipe: RecipeArg, settings: Settings = None, out: Out = None) -> None:
    """Embed and cluster the windows of both corpora."""
    _run(recipe, settings, out, "cluster")


@app.command()
def weigh(recipe: RecipeArg, settings: Settings = None, out: Out = None) -> None:
    """Importance weights of the clusters, and what they mean, before any training."""
    _run(recipe, settings, out, "weigh")


@app.command()
def pretrain(
    recipe: RecipeArg, settings: Settings = None, out: Out = None,
    expert: Annotated[int | None, typer.Option(help="train this expert of slm-mix only")] = None,
) -> None:
    """Pretrain what the recipe's methods need; without domains, for those to come."""
    alone = [] if expert is None else [f"mixture.expert={expert}", "methods=[slm-mix]"]
    _run(recipe, [*(settings or []), *alone], out, "pretrain")


@app.command()
def specialize(
    recipe: Annotated[str, typer.Argument(help="a recipe, or a bundle of slm-pn or slm-mix")],
    settings: Annotated[list[str] | None, typer.Argument(
        help="recipe keys key=value; with a bundle also the documents")] = None,
    out: Out = None,
) -> None:
    """Fine-tune on the domains; or specialise a bundle on documents, offline."""
    if not Path(recipe).is_dir():
        return _run(recipe, settings, out, "specialize")
    from planearly.stages import pipeline
    from planearly.stages.experts import from_bundle

    words = settings or []
    documents = [word for word in words if "=" not in word]
    if not documents:
        raise UserError("name the documents to specialise on: planearly specialize BUNDLE DOCS...")
    made = from_bundle(Path(recipe), documents, [word for word in words if "=" in word])
    pipeline.run(made, out or Path("runs") / made.name)
    return None


@app.command()
def export(recipe: RecipeArg, settings: Settings = None, out: Out = None) -> None:
    """Write the specialized models as Hugging Face folders."""
    _run(recipe, settings, out, "export")


@app.command()
def report(recipe: RecipeArg, settings: Settings = None, out: Out = None) -> None:
    """Write the report of a run, as one HTML file."""
    _run(recipe, settings, out, "report")


@app.command()
def gguf(
    model: Annotated[Path, typer.Argument(help="a model folder that planearly exported")],
    out: Annotated[Path, typer.Option(help="file to write")] = Path("model.gguf"),
    weights: Annotated[str, typer.Option(help="f32, f16, bf16 or q8_0")] = "f16",
) -> None:
    """Write a model folder as one GGUF file, for llama.cpp."""
    from planearly.export.gguf import write

    size = write(model, out, weights).stat().st_size
    say(f"{out}: {size / 1e6:.1f} MB of {weights} weights; try it: llama-cli -m {out} -p \"...\"")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a Hugging Face model folder, or a recipe")],
    files: Annotated[list[str] | None, typer.Argument(help="documents (or recipe keys)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    context: Annotated[int | None, typer.Option(help="most tokens of a window")] = None,
    text_field: Annotated[str, typer.Option(help="field that holds the text")] = "text",
    out: Out = None,
) -> None:
    """Perplexity and bits per byte of any causal model folder on documents."""
    if not Path(model).is_dir():
        from planearly import config

        if Path(model).suffix in (".yaml", ".yml") or not files or "=" in files[0]:
            config.find(model)
            return _run(model, files, out, "evaluate")
        raise UserError(f"'{model}' is not a folder: give a model folder in Hugging Face format")
    from planearly.evaluate.files import evaluate_files

    if not files:
        raise UserError("name the documents to evaluate on: planearly evaluate MODEL FILES...")
    result = evaluate_files(Path(model), files, context=context, text_field=text_field)
    if as_json:
        print(json.dumps(result))
        return
    table = Table("file", "perplexity", "95% interval", "bits per byte", "tokens")
    for name, one in [*result["files"].items(), ("all", result)]:
        low, high = one["ci95"]
        table.add_row(name, f"{one['perplexity']:.2f}", f"{low:.2f} to {high:.2f}",
                      f"{one['bits_per_byte']:.3f}", f"{one['tokens']}")
    Console().print(table)
    return None


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="a model folder in Hugging Face format")],
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    tokens: Annotated[int, typer.Option(help="most new tokens")] = 80,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.8,
    top_p: Annotated[float, typer.Option(help="nucleus of the distribution")] = 0.95,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
) -> None:
    """Try a model: continue a prompt."""
    from planearly.evaluate.generate import generate as continue_prompt

    print(continue_prompt(model, prompt, tokens, temperature, top_p, seed))


@app.command()
def recipes(
    reference: Annotated[bool, typer.Option(help="print the reference of every key")] = False,
) -> None:
    """The recipes that come along, and what a recipe may hold."""
    from planearly import config

    if reference:
        print(config.reference())
        return
    for path in sorted(config.recipes_folder().glob("*.yaml")):
        first = path.read_text("utf-8").splitlines()[0]
        print(f"{path.stem:16} {first.removeprefix('#').strip()}")


register(app)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: errors a user can mend are one sentence and status 2."""
    try:
        app(args=arguments, standalone_mode=False)
    except UserError as error:
        print(f"planearly: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except typer.Exit as done:
        raise SystemExit(done.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):
        print("planearly: stopped; the same command continues from here", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        from planearly.files import storage_error

        if error.filename is None and error.errno is None:
            raise
        place = Path(error.filename) if isinstance(error.filename, str) else Path(".")
        print(f"planearly: {storage_error(error, place)}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
