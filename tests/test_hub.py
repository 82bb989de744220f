"""The upload of a run: the real client of the Hugging Face Hub against a server of our own."""

import base64
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, composed
from local_server import JSONHandler, LocalServer

from pai_bench import experiment
from pai_bench.errors import ConfigError, DataError, UserError
from pai_bench.runs.hub import FILES, card, push

pytest.importorskip("huggingface_hub")


class Hub(LocalServer):
    """As much of the Hub as an upload needs."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuse = False
        super().__init__(_Handler)


class _Handler(JSONHandler, BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if "/revision/" in self.path:  # older clients ask how a repository stores large files
            self.answer({"id": "me/net", "sha": "1", "xetEnabled": False})
        else:
            self.answer({"error": "there is nothing"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.server
        hub.tokens.add(self.headers.get("authorization"))
        url = f"http://{self.headers['Host']}/me/net"
        if hub.refuse:
            self.answer({"error": "you may not write there"}, 403)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.answer({"url": url, "id": "1"})
        elif self.path.startswith("/api/models/me/net/preupload/"):
            asked = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}
            )
        elif self.path.startswith("/api/models/me/net/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{url}/commit/1", "commitOid": "1", "success": True})
        else:
            self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub() -> Iterator[Hub]:
    started = Hub()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("hub")
    words = ["model=lenet300", "model.hidden=[16]", "training=smoke", "training.epochs=1", "tracker=none", "device=cpu"]
    cfg = composed(*words, "pruner=snip", "sparsity=0.9", f"results_dir={results}")
    experiment.run(cfg)
    return cfg.directory


def export(directory: Path, hub: Hub, *words: str) -> "subprocess.CompletedProcess[str]":
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_mine"}
    env["HF_HOME"] = str(directory.parent / "hf")
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), str(directory), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_a_run_is_uploaded_with_a_card(directory: Path, hub: Hub) -> None:
    done = export(directory, hub, "--hub", "me/net", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"uploaded to http://127.0.0.1:{hub.server_port}/me/net\n"
    assert set(hub.files) == {*FILES, "README.md"}
    assert all(hub.files[name] == (directory / name).read_bytes() for name in FILES if name != "config.yaml")
    config, here = hub.files["config.yaml"].decode(), (directory / "config.yaml").read_text()
    changed = [new for old, new in zip(here.splitlines(), config.splitlines(), strict=True) if old != new]
    assert changed == ["results_dir: results"] and str(directory.parent) not in config
    (created,) = hub.created
    assert created["name"] == "net" and created["organization"] == "me"
    assert created.get("private") is True or created.get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_mine"}
    row = json.loads(hub.files["result.json"])
    text = hub.files["README.md"].decode()
    assert f"# {row['id']}" in text and f"{100 * row['test_top1']:.2f} %" in text and "pruned by SNIP" in text
    assert f"{row['num_kept']:,} of {row['num_prunable']:,}" in text
    assert set(re.findall(r"^\| `([\w.]+)` \|", text, re.M)) == set(FILES)


def test_the_card_of_a_dense_network_says_so(directory: Path) -> None:
    row = json.loads((directory / "result.json").read_text()) | {"sparsity": 0.0}
    text = card(composed("model=lenet300"), row)
    assert "lenet300-h16, trained on digits.\n" in text and "pruned by" not in text


@pytest.fixture
def upload(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`push` in this process, to the hub of the test."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    return push


def test_what_the_hub_refuses_is_said(directory: Path, hub: Hub, upload: Callable[..., str]) -> None:
    hub.refuse = True
    with pytest.raises(UserError, match=r"--hub me/net: it cannot be uploaded \(.*403.*; `hf auth login` gives access"):
        upload(directory, "me/net", False)
    with pytest.raises(ConfigError, match="--hub no such/name/at all: there can be no such repository; give USER/NAME"):
        upload(directory, "no such/name/at all", False)
    assert not hub.files


def test_a_hub_that_cannot_be_reached_is_said(directory: Path, hub: Hub, upload: Callable[..., str]) -> None:
    hub.server_close()
    with pytest.raises(UserError, match=r"--hub me/net: it cannot be uploaded \(") as said:
        upload(directory, "me/net", False)
    assert "\n" not in str(said.value)


def test_a_run_without_weights_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is not the directory of a finished run"):
        push(tmp_path, "me/net", False)
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"there is no model\.safetensors"):
        push(copy, "me/net", False)


def test_a_file_and_a_hub_exclude_each_other(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", str(directory), "-o", "m.pt", "--hub", "me/net"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "export.py"), run_name="__main__")
    assert "not allowed with argument" in capsys.readouterr().err
