"""A model folder or a bundle as a repository of the Hugging Face hub, with its card, or as a folder
of a store.

What the folder holds goes there as it is, in one commit; a bundle gets the card that it lacks. Who
may write is the hub's to say: log in with ``hf auth login`` or set ``HF_TOKEN``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from planearly import storage
from planearly.data.hub import unanswered
from planearly.errors import UserError, flattened
from planearly.export import bundle
from planearly.model import flops
from planearly.progress import say
from planearly.units import short

_CARD = "README.md"


def push(folder: Path, name: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Upload a model folder, or a bundle, and return its address.

    Args:
        name: ``organisation/repository``, made if it is not there; or the URL of a folder in a
            store, which then holds nothing else that was published there.
        private: whether a new repository is seen by its owners alone.
        endpoint: address of the hub (None: as `huggingface_hub` is set).

    Raises:
        UserError: neither a model folder nor a bundle, or the hub or store refuses it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    card = None
    if (folder / "bundle.json").is_file():
        card = None if (folder / _CARD).is_file() else bundle_card(bundle.read_info(folder), name)
    elif not (folder / "config.json").is_file():
        raise UserError(f"{folder} is neither a model folder nor a bundle: give one that planearly "
                        "exported (model/NAME/export) or saved (bundle/NAME/bundle)")
    files = [path for path in sorted(folder.rglob("*"))
             if path.is_file() and not any(part.startswith(".") for part in
                                           path.relative_to(folder).parts)]
    if storage.is_url(name):
        storage.check_writable(name)
        sent = storage.publish({path.relative_to(folder).as_posix(): path for path in files}, name,
                               last="bundle.json" if (folder / "bundle.json").is_file()
                               else "config.json")
        say(f"{sent} of {len(files)} files were sent; the others were there")
        return name
    operations: list[Any] = [CommitOperationAdd(path.relative_to(folder).as_posix(), path)
                             for path in files]
    if card:
        operations.append(CommitOperationAdd(_CARD, card.encode()))
    api = HfApi(endpoint=endpoint)
    say(f"uploading {len(operations)} files, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB, "
        f"to {name}")
    refusals: tuple[type[Exception], ...] = (  # the last is of the transport in Rust, hf_xet
        *unanswered(), RuntimeError)
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.create_commit(name, operations, commit_message="Upload with planearly")
    except refusals as error:
        raise UserError(f"the hub did not take {folder} as '{name}' ({flattened(error)}); log "
                        "in with 'hf auth login', and name a repository that you may "
                        "write") from error
    return address


def bundle_card(info: dict[str, Any], name: str) -> str:
    """The card of a bundle, by what :func:`planearly.export.bundle.read_info` says."""
    kind, shape, verb, more = info["kind"], info["shape"], "specialize", ""
    front = {"library_name": "planearly", "tags": ["planearly", kind]}
    small = shape and (
        f"A bundle of `{kind}`, which reads {shape.context} tokens: from it, a small model of "
        f"{short(flops.parameters(shape))} parameters for a new domain is")
    if kind == bundle.CLUSTERS:
        title = f"{' and '.join(map(str, info['levels']))} clusters"
        told = ("Clusters of a generic corpus: by them the owner of a domain counts a histogram, "
                "from which others pretrain a model for it without its text")
        verb, more = "weigh", " --share histogram.json"
    elif bundle.adapts(kind):
        title = f"small models, {info['step']} steps into their pretraining"
        told = f"{small} pretrained to the end, on generic text of one's own that looks like it"
        more = " 'generic=[MY_CORPUS]'"
    else:
        title = f"{info['experts']} experts"
        told = f"{small} made offline, without the text that it was pretrained on"
    return "\n\n".join([
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name.rpartition('/')[2]}: {title}",
        f"{told}. Its clusters were made with the embedder `{info['embedder']['name']}`.",
        f"```\nhf download {name} --local-dir bundle\nplanearly {verb} bundle MY_DOCUMENTS{more}\n"
        "```",
    ]) + "\n"
