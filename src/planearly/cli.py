"""The command: ``planearly VERB``. Results go to standard output, progress to standard error."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planearly import __version__, api, config, files, processes, storage, usage
from planearly.errors import UserError, printable
from planearly.files import line_of_json
from planearly.progress import say

if TYPE_CHECKING:
    from planearly.keys import Recipe

app = typer.Typer(
    cls=usage.Verbs, invoke_without_command=True, pretty_exceptions_enable=False,
    help="Which small language model to train for a domain, at what cost, and the training.",
)

RecipeArg = Annotated[str, typer.Argument(
    help="a recipe file, or the name of one that 'planearly recipes' lists",
    autocompletion=usage.recipes)]
Settings = Annotated[list[str] | None, typer.Argument(
    help="key=value for keys of the recipe; 'planearly recipes --reference' explains them",
    autocompletion=usage.settings)]
Out = Annotated[str | None, typer.Option(
    help="run folder, or its URL in a store", show_default="runs/NAME, NAME the recipe's")]
To = Annotated[str | None, typer.Option(
    help="URL of a folder to publish models, bundles, results and page in, as s3://bucket/models")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Device = Annotated[str | None, typer.Option(
    help="a100, h100, l4, rtx-4090, ...; or what the driver calls it; here: this machine's",
    show_default="here")]


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Which small language model to train for a domain, at what cost, and the training."""
    if version:
        print(f"planearly {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def _run(recipe: str, settings: list[str] | None, out: str | None, until: str,
         **more: Any) -> None:
    api.run(config.load(recipe, settings or []), out, until=until, **more)


def _of_bundle(folder: str, words: list[str] | None, verb: str) -> Recipe:
    """The recipe that takes a bundle to the documents among the words."""
    documents = [word for word in words or [] if "=" not in word or usage.names_documents(word)]
    if not documents:
        raise UserError(f"name the documents: planearly {verb} BUNDLE DOCS...")
    from planearly.stages.bundled import from_bundle

    return from_bundle(folder, documents, [word for word in words or [] if word not in documents])


@app.command()
def run(recipe: RecipeArg, settings: Settings = None, out: Out = None, to: To = None) -> None:
    """Do all of it: prepare, cluster, weigh, pretrain, specialize, evaluate, export, report."""
    _run(recipe, settings, out, "report", to=to)


@app.command()
def study(
    recipe: Annotated[str, typer.Argument(
        help="a recipe with a grid: a file, or a name such as study-nano; with --report also a "
             "study.json", autocompletion=usage.recipes)],
    settings: Settings = None, out: Annotated[Path | None, typer.Option(
        help="run folder", show_default="runs/NAME, NAME the recipe's; of a study.json its own",
        callback=usage.local)] = None,
    workers: Annotated[int | None, typer.Option(
        min=1, max=1024,
        help="processes that share the work; several on one GPU help where models are too small to "
             "keep it busy", show_default="one, or one per GPU")] = None,
    only_report: Annotated[bool, typer.Option(
        "--report", help="train nothing: write tables, figures and page of what is finished")
    ] = False,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="only list the cells, their sizes and what they will cost")] = False,
    device: Annotated[str, typer.Option(help="what --dry-run reckons with; as of 'plan'")] = "here",
    worker: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare methods over domains, set sizes and budgets: tables, figures and a page."""
    if only_report and Path(recipe).suffix == ".json":
        from planearly.studies import suite
        from planearly.study.run import again

        again(Path(recipe), out or Path(recipe).parent, suite)
        return None
    loaded = config.load(recipe, settings or [])
    place = out or Path("runs") / loaded.name
    if dry_run:
        from planearly.study import forecast

        return forecast.show(forecast.forecast(loaded, device, workers))
    if worker:
        from planearly.study.workers import serve

        return serve(loaded, place, worker)
    from planearly.studies import suite
    from planearly.study import run as studies

    studies.study(loaded, place, suite(loaded.study.suite), workers, only_report)
    return None


@app.command()
def prepare(recipe: RecipeArg, settings: Settings = None, out: Out = None) -> None:
    """Documents to windows of tokens."""
    _run(recipe, settings, out, "prepare")


@app.command()
def cluster(
    recipe: RecipeArg, settings: Settings = None, out: Out = None,
    share: Annotated[Path | None, typer.Option(callback=usage.local, help=(
        "folder to write the clusters to, for owners of domains to count by"))] = None,
) -> None:
    """Embed and cluster the windows of both corpora."""
    _run(recipe, settings, out, "cluster", share=share)


@app.command()
def weigh(
    recipe: Annotated[str, typer.Argument(
        help="a recipe, or a bundle (also one of clusters)", autocompletion=usage.recipes)],
    settings: Annotated[list[str] | None, typer.Argument(
        help="recipe keys key=value; with a bundle also the documents",
        autocompletion=usage.settings)] = None,
    out: Out = None,
    share: Annotated[Path | None, typer.Option(callback=usage.local, help=(
        "file to write the domain's histogram over clusters to, without its text"))] = None,
    epsilon: Annotated[float | None, typer.Option(help=(
        "add noise to that file: differential privacy by document"))] = None,
) -> None:
    """What is drawn of the corpus for a domain, and what that is worth, before any training."""
    more: dict[str, Any] = {"share": share, "epsilon": epsilon}
    if usage.is_folder(recipe):
        made = _of_bundle(recipe, settings, "weigh")
        api.run(made, out, until="weigh", **more)
    else:
        _run(recipe, settings, out, "weigh", **more)


@app.command()
def pretrain(
    recipe: RecipeArg, settings: Settings = None, out: Out = None,
    expert: Annotated[int | None, typer.Option(help="train only this expert of a mixture")] = None,
) -> None:
    """Pretrain what the recipe's methods need; without domains, for those to come."""
    from planearly import methods as table

    mixtures = ",".join(row.name for row in table.TABLE.values() if row.bank == "mixture")
    alone = [] if expert is None else [f"mixture.expert={expert}", f"methods=[{mixtures}]"]
    _run(recipe, [*(settings or []), *alone], out, "pretrain")


@app.command()
def specialize(
    recipe: Annotated[str, typer.Argument(help="a recipe, or a bundle")],
    settings: Annotated[list[str] | None, typer.Argument(
        help="recipe keys key=value; with a bundle also the documents")] = None,
    out: Out = None,
) -> None:
    """Fine-tune on the domains; or specialise a bundle on documents, where they are."""
    if not usage.is_folder(recipe):
        return _run(recipe, settings, out, "specialize")
    api.run(_of_bundle(recipe, settings, "specialize"), out)
    return None


@app.command()
def export(
    recipe: Annotated[str, typer.Argument(
        help="a recipe, or the run folder of one", autocompletion=usage.recipes)],
    settings: Settings = None, out: Out = None, to: To = None,
) -> None:
    """Write the specialized models as Hugging Face folders; or publish those of a run."""
    if Path(recipe).is_dir():
        from planearly.stages.noted import recipe_file

        recipe, out = str(recipe_file(Path(recipe))), out or recipe
    _run(recipe, settings, out, "export", to=to)


@app.command()
def report(recipe: RecipeArg, settings: Settings = None, out: Out = None, to: To = None) -> None:
    """Write the report of a run, as one HTML file."""
    _run(recipe, settings, out, "report", to=to)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="a run folder, of a run or a study")],
    fast: Annotated[bool, typer.Option(
        "--fast", help="compare the sizes of files alone, not their digests")] = False,
    as_json: Json = False,
) -> None:
    """Check a run folder: what is missing, altered or interrupted, and what would be made again."""
    from planearly.stages import doctor as doctors
    from planearly.stages.noted import recipe_of

    recipe = recipe_of(folder)
    models = None
    if recipe.study.grid:
        from planearly.study import cells

        models = cells.models(recipe, folder)
    found = doctors.examine(folder, models, deep=not fast)
    if as_json:
        print(line_of_json(found.to_dict()))
    else:
        doctors.show(found)
    if found.damaged:
        raise typer.Exit(1)


@app.command()
def gguf(
    model: Annotated[str, typer.Argument(
        help="a model folder that planearly exported, or its URL")],
    out: Annotated[str, typer.Option(help="file to write, or its URL")] = "model.gguf",
    weights: Annotated[str, typer.Option(help="f32, f16, bf16 or q8_0")] = "f16",
    modelfile: Annotated[bool, typer.Option(
        "--modelfile", help="write a Modelfile beside it, for Ollama")] = False,
) -> None:
    """Write a model folder as one GGUF file, for llama.cpp."""
    from planearly.export.gguf import modelfile as write_modelfile
    from planearly.export.gguf import write

    folder = api.model_folder(model)
    with storage.written(out) as place:
        size = write(folder, place, weights).stat().st_size
        made = write_modelfile(folder, place) if modelfile else None
    told = f"; try it: llama-cli -m {out} -p \"...\"" if not storage.is_url(out) else ""
    say(f"{out}: {size / 1e6:.1f} MB of {weights} weights{told}")
    if made:
        say(f"{made.name} beside it: for Ollama: ollama create NAME -f {made.name}"
            if storage.is_url(out) else f"{made}: for Ollama: ollama create NAME -f {made}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="an exported model folder, or a bundle")],
    name: Annotated[str, typer.Argument(
        help="organisation/repository on the Hugging Face hub, or the URL of a folder")],
    private: Annotated[bool, typer.Option(
        "--private", help="a new repository is seen by its owners alone")] = False,
) -> None:
    """Upload a model or a bundle to the Hugging Face hub, with its card, or to a store."""
    from planearly.export import hub

    print(hub.push(folder, name, private=private))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(
        help="a Hugging Face model folder or its URL, or a recipe")],
    files: Annotated[list[str] | None, typer.Argument(help="documents (or recipe keys)")] = None,
    as_json: Json = False,
    context: Annotated[int | None, typer.Option(help="most tokens of a window")] = None,
    text_field: Annotated[str, typer.Option(help="field that holds the text")] = "text",
    out: Out = None,
) -> None:
    """Perplexity and bits per byte of any causal model folder on documents."""
    if not usage.is_folder(model):
        if Path(model).suffix in (".yaml", ".yml") or not files or "=" in files[0]:
            config.find(model)
            return _run(model, files, out, "evaluate")
        raise UserError(f"'{model}' is not a folder: give a model folder in Hugging Face format")
    if not files:
        raise UserError("name the documents to evaluate on: planearly evaluate MODEL FILES...")
    result = api.evaluate(model, files, context=context, text_field=text_field)
    from planearly.evaluate.show import show

    return print(line_of_json(result)) if as_json else show(result)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(
        help="a model folder in Hugging Face format, or its URL")],
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    tokens: Annotated[int, typer.Option(min=1, max=10**6, help="most new tokens")] = 80,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.8,
    top_p: Annotated[float, typer.Option(help="nucleus of the distribution")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="of the draws")] = 0,
) -> None:
    """Try a model: continue a prompt."""
    print(api.generate(model, prompt, tokens=tokens, temperature=temperature, top_p=top_p,
                       seed=seed))


@app.command()
def recipes(
    reference: Annotated[bool, typer.Option(
        "--reference", help="explain every key instead")] = False,
) -> None:
    """The recipes and the corpora that have names, and what a recipe may hold."""
    if reference:
        print(config.reference())
        return
    for path in sorted(config.recipes_folder().glob("*.yaml")):
        first = path.read_text("utf-8").splitlines()[0]
        print(f"{path.stem:16} {first.removeprefix('#').strip()}")
    from planearly.data import corpora
    from planearly.units import short

    print("\ngeneric=[...] takes these corpora by name:")
    for name, corpus in corpora.TABLE.items():
        print(f"{name:16} {short(corpus.tokens)} tokens, {corpus.licence}; {corpus.entry}")


@app.command()
def methods() -> None:
    """The methods that a recipe may name in methods=[...], and what each is."""
    from planearly import methods as table

    for row in table.TABLE.values():
        print(f"{row.name:10} {row.sentence}{f' ({row.source})' if row.source else ''}")


@app.command()
def plan(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(
        help="say what this recipe will cost and recommend nothing; takes --device and --json "
             "alone", autocompletion=usage.recipes)] = None,
    settings: Annotated[list[str] | None, typer.Argument(
        help="key=value for its keys", autocompletion=usage.settings)] = None,
    inference_params: Annotated[str | None, typer.Option(
        help="most parameters of the deployed model, as 126M")] = None,
    inference_bytes: Annotated[str | None, typer.Option(
        help="or most bytes of its weights, as 150MB, in the precision of --quantization")] = None,
    inference_speed: Annotated[float | None, typer.Option(
        help="or least tokens/s that it decodes on --inference-device")] = None,
    inference_device: Device = None,
    quantization: Annotated[str, typer.Option(
        help="precision of the deployed weights: bf16, q8_0, q4_k_m, ...")] = "bf16",
    generic_tokens: Annotated[str, typer.Option(
        help="size of the generic corpus, as 150B, or the files themselves")] = "0",
    spec_tokens: Annotated[list[str] | None, typer.Option(
        help="tokens of one domain's documents, as 1M, or the files themselves; may be given again "
             "for other domains")] = None,
    domains: Annotated[str | None, typer.Option(
        help="number of domains", show_default="the number of --spec-tokens")] = None,
    domains_later: Annotated[str, typer.Option(help="number of domains to come")] = "0",
    device: Device = None,
    devices: Annotated[int, typer.Option(help="how many of them")] = 1,
    generic_hours: Annotated[str | None, typer.Option(
        help="budget before the domain is known: device-hours, as 650 or 90min")] = None,
    specialization_hours: Annotated[str | None, typer.Option(
        help="budget for each domain: device-hours")] = None,
    generic_money: Annotated[str | None, typer.Option(
        help="--generic-hours as money, with --price")] = None,
    specialization_money: Annotated[str | None, typer.Option(
        help="--specialization-hours as money, with --price")] = None,
    price: Annotated[str | None, typer.Option(help="money per device-hour")] = None,
    currency: Annotated[str | None, typer.Option(
        help="of the money", show_default="as the amounts say, or USD")] = None,
    checkpoint: Annotated[str | None, typer.Option(
        help="an open model to start from: a folder, or NAME:PARAMETERS")] = None,
    teacher: Annotated[str | None, typer.Option(
        help="a teacher that exists already: a folder, or NAME:PARAMETERS")] = None,
    entropy: Annotated[float | None, typer.Option(
        help="of the domain's cluster histogram, in nats, as 'planearly weigh' tells it; with "
             "--clusters")] = None,
    clusters: Annotated[int | None, typer.Option(help="number of clusters of --entropy")] = None,
    foreseen: Annotated[float | None, typer.Option(
        help="nats per token by which text drawn for the domain foretells it better than the "
             "corpus as it is, below 0 where worse, as 'planearly weigh' tells it")] = None,
    windows: Annotated[int | None, typer.Option(
        help="windows of a domain's documents, which bound the number of clusters")] = None,
    results: Annotated[list[Path] | None, typer.Option(
        help="results.json of your own small runs, or a study.json: perplexity, and how much to "
             "pretrain before the domain is known and for each, are predicted from these")] = None,
    paper: Annotated[bool, typer.Option(
        "--paper", help="recommend by the paper's Figure 1, whatever --results and --foreseen "
                        "say")] = False,
    out: Annotated[Path | None, typer.Option(
        callback=usage.local, help="folder for plan.json, plan.html and recipes")] = None,
    html: Annotated[Path | None, typer.Option(
        callback=usage.local, help="file for a page on which limits, budgets and the number of "
                                   "domains can be moved")] = None,
    as_json: Json = False,
) -> None:
    """Recommend a method, with its reason and every method's cost; or cost one recipe."""
    from rich.console import Console

    from planearly.plan import show

    if recipe is not None:
        if idle := usage.given(context, "recipe", "settings", "device", "as_json"):
            raise UserError(f"{', '.join(idle)}: with a recipe, plan says what that will cost and "
                            "takes --device and --json alone; without one it recommends a method")
        loaded = config.load(recipe, settings or [])
        stages = api.predict(loaded, device)
        return print(line_of_json(stages)) if as_json else show.predicted(stages, Console())
    made, content = api.planned(
        out, html=html, device=device, inference_params=inference_params,
        inference_bytes=inference_bytes,
        inference_speed=inference_speed, inference_device=inference_device,
        quantization=quantization, generic_tokens=generic_tokens, spec_tokens=spec_tokens or (),
        domains=domains, domains_later=domains_later, devices=devices,
        generic_hours=generic_hours, specialization_hours=specialization_hours,
        generic_money=generic_money, specialization_money=specialization_money, price=price,
        currency=currency, checkpoint=checkpoint, teacher=teacher, entropy=entropy,
        clusters=clusters, foreseen=foreseen, windows=windows, results=results or (), paper=paper)
    if as_json:
        return print(line_of_json(content))
    show.text(made, Console())
    if out is not None:
        start = out / f"{made.recommended}.yaml"
        print(f"Recipes, plan.json and plan.html are in {out}"
              + (f"; start with: planearly run {start}" if start.exists() else ""))
    if html is not None:
        print(f"{html}: this plan, and what it would be under other limits")
    return None


@app.command()
def cost(
    folders: Annotated[list[Path], typer.Argument(help="folders of runs")],
    as_json: Json = False,
) -> None:
    """Add up what runs cost, per method and domain, predicted beside actual."""
    from rich.console import Console

    from planearly.cost import ledger
    from planearly.plan import show

    found = ledger.add_up(folders)
    if as_json:
        print(line_of_json(found))
        return
    show.ledger(found, Console())


@app.command()
def calibrate(
    recipe: Annotated[str | None, typer.Argument(
        help="a recipe whose shapes and precision are measured",
        show_default="nano, on a GPU slm-126m", autocompletion=usage.recipes)] = None,
    settings: Settings = None,
    seconds: Annotated[float, typer.Option(help="of training steps, in all")] = 60.0,
    workers: Annotated[int, typer.Option(
        min=1, max=64, help="trainings side by side on the device, as a study's --workers has "
                            "them: its --dry-run then knows their hours")] = 1,
) -> None:
    """Measure this device on real training steps; plans and ledgers then use what it did."""
    import torch

    from planearly import config
    from planearly.plan.calibrate import calibrate as measure

    if not 0 < seconds <= 3600:
        raise UserError("--seconds: give a number above 0 and at most 3600")
    name = recipe or ("slm-126m" if torch.cuda.is_available() else "nano")
    print(measure(config.load(name, settings or []), seconds, workers))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: what a user can mend is one sentence on standard error and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows ASCII alone still shows all
            stream.reconfigure(errors="backslashreplace")
    if "_PLANEARLY_COMPLETE" in os.environ:  # the shell asks what could come next
        return app(prog_name="planearly")
    command = typer.main.get_command(app)
    words, status = list(sys.argv[1:] if arguments is None else arguments), 0
    try:
        usage.supported()
        try:
            with (processes.ending_in_order(),
                  command.make_context("planearly", words.copy()) as context):
                command.invoke(context)
        except typer.Exit as done:
            status = done.exit_code
        sys.stdout.flush()
        if status:
            sys.exit(status)
    except usage.USAGE_ERROR as error:
        _fail(usage.sentence(error, words, command))
    except UserError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort) as stop:
        _fail("stopped; the same command continues from here",
              stop.status if isinstance(stop, processes.Stopped) else 130)
    except OSError as error:
        if usage.nobody_reads(error):
            sys.exit(141)  # as a program that SIGPIPE ends
        if error.filename is None and error.errno is None:
            raise
        _fail(str(files.file_error(error)))
    return None


def _fail(sentence: str, status: int = 2) -> None:
    print(f"planearly: {printable(sentence)}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
