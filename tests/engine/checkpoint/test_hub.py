"""Protects: of a hub's repository only the model is fetched; its answers are told apart; what is cached runs offline.

The hub is a small HTTP server on this machine, asked by the hub's own client in a process of its own, since
its settings are read when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import loras
import models
import pytest

ROOT = Path(__file__).resolve().parents[3]
SHA = "0123456789abcdef0123456789abcdef01234567"
MODEL = "org/tiny"


class Hub(ThreadingHTTPServer):
    """As much of the hub's interface as fetching a model takes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.others: dict[str, dict[str, bytes]] = {}
        """Files of revisions beside `main`, which `files` are."""
        self.broken: set[str] = set()
        """Names of files whose connection ends after half of the content."""
        self.xet: set[str] = set()
        """Names of files whose content is in a Xet storage, which this server is, too."""
        self.tokens: set[str | None] = set()
        """What requests have had as Authorization."""
        self.fetched: list[str] = []
        """Names of files whose content was sent."""
        self.answer: Callable[[_Handler], None] | None = None
        """Given to every request, if any."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.server.answer is not None:
            self.server.answer(self)
            return
        if self.path == "/mended":
            self.server.broken = set()
            self.send(200, b"")
            return
        path = unquote(self.path.partition("?")[0])
        if path.startswith(("/cas/", f"/api/models/{MODEL}/xet-read-token/")):
            self.store(path)
            return
        self.server.tokens.add(self.headers["Authorization"])
        revisions = {"main": self.server.files, **self.server.others}
        commits = {_commit(name): files for name, files in revisions.items()}
        for name, files in {**revisions, **commits}.items():
            sha = name if name in commits else _commit(name)
            resolve = f"/{MODEL}/resolve/{name}/"
            if path == f"/api/models/{MODEL}/revision/{name}" or (path, name) == (f"/api/models/{MODEL}", "main"):
                self.reply({"id": MODEL, "sha": sha, "siblings": [{"rfilename": each} for each in files]})
                return
            if path == f"/api/models/{MODEL}/tree/{name}":
                self.reply([self.listed(each, content) for each, content in files.items()])
                return
            if path.startswith(resolve) and (asked := path.removeprefix(resolve)) in files:
                self.give(asked, files[asked], sha)
                return
        missing = "RevisionNotFound" if "/revision/" in path else "EntryNotFound"
        self.send(404, b"", {"X-Error-Code": missing})

    def listed(self, name: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
        if name not in self.server.xet:
            return entry
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {**entry, "lfs": large, "xetHash": hashlib.sha256(name.encode()).hexdigest()}

    def store(self, path: str) -> None:
        """The Xet storage: of a file of a hash, which chunks of which container; of that, bytes."""
        url = f"{self.server.url}/cas"
        stored = {hashlib.sha256(name.encode()).hexdigest(): name for name in self.server.xet}
        kind, _, asked = path.removeprefix("/cas/").rpartition("/")
        if "xet-read-token" in path:
            token = {"Cas-Url": url, "Access-Token": "t", "Token-Expiration": str(2**32)}
            self.send(200, b"{}", {f"X-Xet-{name}": value for name, value in token.items()})
        elif kind == "v1/reconstructions" and asked in stored and stored[asked] not in self.server.broken:
            content = self.server.files[stored[asked]]
            both = {"start": 0, "end": 2}
            where = {"url": f"{url}/container/{asked}", "url_range": {"start": 0, "end": len(_container(content)) - 1}}
            term = {"hash": asked, "unpacked_length": len(content), "range": both}
            info = {asked: [{"range": both, **where}]}
            self.reply({"offset_into_first_range": 0, "terms": [term], "fetch_info": info})
        elif kind == "container":
            self.server.fetched.append(f"xet:{stored[asked]}")
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            packed = _container(self.server.files[stored[asked]])
            self.send(206, packed[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(packed)}"})
        else:
            self.send(404, b"")

    def give(self, name: str, content: bytes, sha: str) -> None:
        if self.command == "GET":
            self.server.fetched.append(name)
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        if self.command == "GET" and name in self.server.broken:
            self.send(200, content, headers, sent=len(content) // 2)
        else:
            self.send(200, content, headers)

    def reply(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:sent])


def _container(content: bytes) -> bytes:
    """Two chunks as Xet stores them: version, packed length, compression (none), length, bytes."""
    half = len(content) // 2
    sized = lambda part: bytes([0]) + len(part).to_bytes(3, "little")  # noqa: E731
    return b"".join(2 * sized(part) + part for part in (content[:half], content[half:]))


def _commit(revision: str) -> str:
    return SHA if revision == "main" else hashlib.sha1(revision.encode(), usedforsecurity=False).hexdigest()


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as server:
        yield server


def run(code: str, url: str, home: Path, **settings: str) -> tuple[int, str, float]:
    """Exit code, output and seconds of a process whose hub is at `url`, with what `home` has cached."""
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin", **settings}
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.rstrip("\n"), time.perf_counter() - begin


def ask(url: str, home: Path, call: str = "resolve(MODEL)", **settings: str) -> tuple[int, str, float]:
    """`run` with a call that prints where the model is, or why it is not."""
    code = f"""
import sys
from engine.checkpoint.hub import resolve
from engine.errors import EngineError
MODEL = {MODEL!r}
try:
    print({call})
except EngineError as error:
    print(error)
    sys.exit(2)
"""
    return run(code, url, home, **settings)


def weights(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return weights(models.save_model(tmp_path_factory.mktemp("tiny"), "llama"))


SIDE = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
EXTRA = dict.fromkeys(
    (
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "original/consolidated.00.pth",
        "original/params.json",
        "onnx/model.onnx",
        "onnx/config.json",
        "pytorch_model.bin",
        "tf_model.h5",
        "README.md",
        "modeling_tiny.py",
    ),
    b"much",
)
SHARDS = {"model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2"}
INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": [*SHARDS][1]}})
REPOSITORIES: dict[str, tuple[dict[str, bytes], set[str]]] = {
    "one file": ({"model.safetensors": b"w"}, {"model.safetensors"}),
    "shards": (
        {**SHARDS, "model.safetensors.index.json": INDEX.encode()},
        {*SHARDS, "model.safetensors.index.json"},
    ),
    "a bin": ({}, {"pytorch_model.bin"}),
}


@pytest.mark.parametrize("download_weights", [True, False])
def test_an_adapter_is_fetched_and_its_base_model_found(download_weights: bool, hub: Hub, tmp_path: Path) -> None:
    """The adapter's own weights are fetched in any case: it cannot be told without them whether it is one."""
    base = models.save_model(tmp_path / "base", "llama")
    lora = loras.save_adapter(tmp_path / "lora", base)
    hub.files = {**weights(lora), **dict.fromkeys(("README.md", "optimizer.pt", "model.safetensors"), b"much")}
    located = "__import__('engine.checkpoint.adapters.located').checkpoint.adapters.located"
    call = f"str({located}.locate(MODEL, download_weights={download_weights}))"
    settings = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    code, told, _ = ask(hub.url, tmp_path / "home", call, **settings)
    assert code == 0, told
    assert str(tmp_path / "cache" / "flexgen-helm" / "adapters") in told
    assert sorted(hub.fetched) == ["adapter_config.json", "adapter_model.safetensors"]
    code, again, _ = ask(hub.url, tmp_path / "home", call, HF_HUB_OFFLINE="1", **settings)
    assert (code, again) == (0, told)


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_only_the_model_is_fetched(kind: str, hub: Hub, tiny: dict[str, bytes], tmp_path: Path) -> None:
    more, chosen = REPOSITORIES[kind]
    side = {name: content for name, content in tiny.items() if name in SIDE}
    hub.files = {**side, **EXTRA, **more}
    status, line, _ = ask(hub.url, tmp_path)
    assert status == 0, line
    assert {*hub.fetched} == {*side, *chosen}
    assert {file.name for file in Path(line).iterdir()} == {*side, *chosen}


def test_weights_are_fetched_only_when_they_are_wanted(hub: Hub, tiny: dict[str, bytes], tmp_path: Path) -> None:
    hub.files = tiny
    status, line, _ = ask(hub.url, tmp_path, "resolve(MODEL, download_weights=False)")
    assert status == 0, line
    assert "model.safetensors" not in hub.fetched
    assert "config.json" in hub.fetched


def text(status: int, content: str, **headers: str) -> Callable[[_Handler], None]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.send(status, content.encode(), named)


ANSWERS: dict[str, tuple[Callable[[_Handler], None], list[str]]] = {
    "not there": (text(404, "", X_Error_Code="RepoNotFound"), ["not on the hub", "log in"]),
    "private": (text(401, "", X_Error_Message="Invalid username or password."), ["HTTP 401", "log in"]),
    "gated": (text(403, "", X_Error_Code="GatedRepo"), ["is gated", "accept its terms at", "/org/model-"]),
    "gated, no token": (text(401, "", X_Error_Code="GatedRepo"), ["is gated", "hf auth login"]),
    "forbidden": (text(403, "no"), ["does not allow", "HTTP 403"]),
    "a fault": (text(500, "oops"), ["answers HTTP 500", "try again later"]),
    "too many": (text(429, "slow down"), ["answers HTTP 429"]),
    "a login page": (text(200, "<html>log in</html>", Content_Type="text/html"), ["in an unknown way", "proxy"]),
    "garbage": (text(200, "\x00\x01", Content_Type="application/json"), ["in an unknown way"]),
    "JSON of something else": (text(200, "[1]", Content_Type="application/json"), ["in an unknown way"]),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process says of a model for each of the answers."""
    answers = {f"org/model-{number}": answer for number, (answer, _) in enumerate(ANSWERS.values())}

    def answer(handler: _Handler) -> None:
        answers[next(name for name in answers if handler.path.endswith(name) or f"{name}/" in handler.path)](handler)

    with running() as server:
        server.answer = answer
        code = "\n".join(
            [
                "from engine.checkpoint.hub import resolve",
                "from engine.errors import EngineError",
                f"for name in {[*answers]}:",
                "    try:",
                "        resolve(name)",
                "    except EngineError as error:",
                "        print(error)",
            ]
        )
        status, lines, seconds = run(code, server.url, tmp_path_factory.mktemp("answers"))
    assert status == 0
    assert seconds < 30
    return dict(zip(ANSWERS, lines.split("\n"), strict=True))


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_are_told_apart(kind: str, told: dict[str, str]) -> None:
    line = told[kind]
    assert f"org/model-{[*ANSWERS].index(kind)}" in line
    assert [part for part in ANSWERS[kind][1] if part not in line] == []
    assert "cannot be reached" not in line


UNREACHABLE = {"no such name": "http://hub.invalid", "nobody listens": "http://127.0.0.1:9"}


@pytest.mark.parametrize("kind", UNREACHABLE)
def test_a_hub_that_cannot_be_reached_is_told_soon(kind: str, tmp_path: Path) -> None:
    status, line, seconds = ask(UNREACHABLE[kind], tmp_path)
    assert status == 2
    assert "\n" not in line
    assert "cannot be reached" in line
    assert seconds < 30


@pytest.mark.parametrize("kind", [*UNREACHABLE, "offline", "a fault", "a login page"])
def test_what_is_cached_runs_without_the_hub(kind: str, hub: Hub, tiny: dict[str, bytes], tmp_path: Path) -> None:
    hub.files = {**tiny, "README.md": b"never fetched"}
    status, path, _ = ask(hub.url, tmp_path)
    assert status == 0, path
    if kind in ANSWERS:
        hub.answer = ANSWERS[kind][0]
    offline = {"HF_HUB_OFFLINE": "1"} if kind == "offline" else {}
    status, again, seconds = ask(UNREACHABLE.get(kind, hub.url), tmp_path, **offline)
    assert (status, again) == (0, path)
    assert seconds < 15


def test_offline_without_a_cache_is_told(tmp_path: Path) -> None:
    status, line, seconds = ask("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert status == 2
    assert f"nor in the local hub cache {tmp_path}/hub, and HF_HUB_OFFLINE keeps" in line
    assert seconds < 10


def test_a_revision_is_that_of_the_hubs_own_client(hub: Hub, tmp_path: Path) -> None:
    """Branches, tags, commits and pull requests, with a token, into the cache that HF_HUB_CACHE names."""
    names = ["v2", "refs/pr/1"]
    hub.files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"main"}
    hub.others = {name: {**hub.files, "model.safetensors": name.encode()} for name in names}
    code = f"""
import json
from huggingface_hub import constants, snapshot_download
from engine.checkpoint.hub import commit_of, resolve
from engine.errors import EngineError
def told(name):
    try:
        path = resolve(name)
        return [str(path), (path / "model.safetensors").read_text(), commit_of(path)]
    except EngineError as error:
        return str(error)
asked = [None, *{names}, {_commit("v2")!r}]
found = [told({MODEL!r} + ("" if name is None else "@" + name)) for name in asked]
oracle = [snapshot_download({MODEL!r}, revision=name) for name in asked]
bad = [told({MODEL!r} + end) for end in ("@nope", "@")]
constants.HF_HUB_OFFLINE = True
offline = [told({MODEL!r} + end) for end in ("@v2", "@nope")]
print(json.dumps([found, oracle, bad, offline]))
"""
    settings = {"HF_HUB_CACHE": str(tmp_path / "elsewhere"), "HF_TOKEN": "hf_secret"}
    status, line, _ = run(code, hub.url, tmp_path / "home", **settings)
    assert status == 0
    found, oracle, bad, offline = json.loads(line)
    assert [type(each) for each in found] == [list] * 4, found
    assert [path for path, _, _ in found] == oracle
    assert all(path.startswith(str(tmp_path / "elsewhere")) for path in oracle)
    assert [content for _, content, _ in found] == ["main", *names, "v2"]
    assert [commit for _, _, commit in found] == [SHA, *map(_commit, names), _commit("v2")]
    assert "Bearer hf_secret" in hub.tokens
    assert bad[0] == (f"model '{MODEL}' has no revision 'nope' on the hub {hub.url}; name a branch, a tag or a commit")
    assert bad[1].endswith("ends with @; write a branch, a tag or a commit after it")
    assert offline[0] == found[1]
    assert f"model '{MODEL}@nope' is neither a directory nor in the local hub cache {tmp_path}/elsewhere" in offline[1]


def test_a_download_that_broke_off_is_told_and_goes_on(hub: Hub, tmp_path: Path) -> None:
    """What has arrived is not fetched again; without a network a part of a model is not taken for one."""
    shards = {name: 2000 * content for name, content in SHARDS.items()}
    hub.files = {"config.json": b'{"model_type": "llama"}', "model.safetensors.index.json": INDEX.encode(), **shards}
    second = [*SHARDS][1]
    hub.broken = {second}
    code = f"""
import json, sys
from urllib.request import urlopen
from huggingface_hub import constants
from engine.checkpoint.hub import resolve
from engine.errors import EngineError
def told():
    try:
        path = resolve({MODEL!r})
        return [(path / name).read_text() for name in {[*SHARDS]}]
    except EngineError as error:
        return str(error)
broken = told()
constants.HF_HUB_OFFLINE = True
offline = told()
constants.HF_HUB_OFFLINE = False
urlopen({hub.url!r} + "/mended")
print(json.dumps([broken, offline, told()]))
"""
    status, line, _ = run(code, hub.url, tmp_path)
    assert status == 0
    broken, offline, whole = json.loads(line)
    assert f"model '{MODEL}'" in broken
    assert "\n" not in broken
    assert f"has model '{MODEL}' only in part" in offline
    assert second in offline
    assert "HF_HUB_OFFLINE keeps it from being fetched" in offline
    assert whole == [content.decode() for content in shards.values()]
    assert hub.fetched.count(next(iter(SHARDS))) == 1


def test_weights_in_a_xet_storage_come_by_the_hubs_own_client(hub: Hub, tmp_path: Path) -> None:
    """And a storage that lacks them is told, as any other fault of a hub."""
    pytest.importorskip("hf_xet", reason="hf_xet is not installed; huggingface_hub then fetches files whole")
    hub.files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(range(256)) * 300}
    hub.xet = hub.broken = {"model.safetensors"}
    status, line, _ = ask(hub.url, tmp_path)
    assert (status, "\n" in line) == (2, False), line
    assert f"files of model '{MODEL}' cannot be fetched from the Xet storage of the hub {hub.url}" in line
    hub.broken = set()
    status, line, _ = ask(hub.url, tmp_path)
    assert status == 0, line
    assert (Path(line) / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert hub.fetched == ["config.json", "xet:model.safetensors"]


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up(hub: Hub, tmp_path: Path) -> None:
    hub.answer = lambda _: time.sleep(60)
    status, line, seconds = ask(hub.url, tmp_path)
    assert status == 2
    assert "cannot be reached" in line
    assert seconds < 30
