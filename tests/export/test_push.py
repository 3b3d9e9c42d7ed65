"""Uploading, to a stand-in of the hub that speaks its protocol."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planearly.errors import UserError
from planearly.export import hub
from planearly.model.transformer import Shape
from small_models import model_folder


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: creation, the question how to upload, commits of small files."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        state: Any = self.server
        if self.headers.get("authorization") != "Bearer secret":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            state.made.append(asked)
            name = f"{asked['organization']}/{asked['name']}"
            return self.answer(200, {"url": f"{state.address}/{name}"})
        if "/preupload/" in self.path:
            return self.answer(200, {"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    state.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{state.address}/someone/law/commit/1",
                                     "commitOid": "1", "success": True})
        return self.answer(200, {"errors": [], "warnings": []})  # of the card's front matter

    def answer(self, status: int, values: dict[str, Any]) -> None:
        text = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.made, server.files = [], {}
    monkeypatch.setattr(constants, "ENDPOINT", server.address)  # what older clients take names from
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_goes_up_as_it_is(standin: SimpleNamespace, tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / ".left.tmp").write_text("half")
    address = hub.push(folder, "someone/law", private=True, endpoint=standin.address)
    assert address == f"{standin.address}/someone/law" and (
        standin.made[0].get("private") or standin.made[0]["visibility"] == "private")
    assert standin.files == {p.name: p.read_bytes() for p in folder.iterdir()
                             if not p.name.startswith(".")}


def test_what_the_hub_refuses_is_one_sentence(
    standin: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match=r"did not take .* as 'someone/law' .*hf auth login"):
        hub.push(model_folder(tmp_path), "someone/law", endpoint=standin.address)
    with pytest.raises(UserError, match="neither a model folder nor a bundle"):
        hub.push(tmp_path, "someone/law", endpoint=standin.address)
    standin.shutdown()
    standin.server_close()
    with pytest.raises(UserError, match=r"did not take .* as 'someone/law'"):
        hub.push(tmp_path / "export", "someone/law", endpoint=standin.address)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self: "")
    with pytest.raises(TypeError):  # a slip of our own
        hub.push(tmp_path / "export", "someone/law", endpoint=standin.address)


def test_the_card_of_a_bundle() -> None:
    card = hub.bundle_card({"kind": "slm-pn", "experts": 16, "shape": Shape(2, 32, 4, 48, 300, 64),
                            "embedder": {"name": "static"}}, "someone/early")
    assert "# early: 16 experts" in card and "planearly specialize bundle" in card
    assert "`static`" in card and "tags:\n- planearly\n- slm-pn" in card
