"""A real server with everything from one YAML file: HTTPS, several keys, browsers, log files, sampling defaults."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import picture
from serving import ROOT, TINY_MODEL

from foveate.deploy.look import READY as VISION_READY
from foveate.deploy.welcome import READY

Eventually = Callable[[Callable[[], bool]], None]

ORIGIN = "https://chat.example.com"
KEYS = ["first key", "key-2", "key-3"]
COMMON = f"""
model:
  model: {TINY_MODEL}
  device: cpu
  dtype: float32
  threads: 1
engine:
  num_kv_blocks: 256
"""
SETTINGS = f"""{COMMON}
http:
  port: 0
  api_key: {KEYS[0]}
  api_key_file: secrets/keys
  cors_origins: [http://localhost:3000, {ORIGIN}]
  tls_cert: tls/cert.pem
  tls_key: tls/key.pem
logs:
  log_dir: logs
  log_format: json
  log_stderr: false
  log_max_bytes: 2000
  log_backups: 2
sampling:
  temperature: 0
  max_tokens: 6
"""


def make_certificate(folder: Path, names: str) -> None:
    """Make a certificate that vouches for itself, and its key."""
    folder.mkdir(exist_ok=True)
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=test"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    command = ["openssl", "req", "-x509", *kind, *files, "-addext", f"subjectAltName={names}"]
    subprocess.run(command, check=True, capture_output=True)


@dataclass(frozen=True)
class Running:
    """A server of the file.

    Attributes:
        folder: where the file is; the server runs elsewhere.
        runtime: where its instance's directory is.
        url: as it was printed.
        curl: the command that was printed.
        client: trusts its certificate and has the first key.
    """

    folder: Path
    runtime: Path
    url: str
    curl: str
    client: httpx.Client

    def chat(self, **fields: Any) -> httpx.Response:
        """Ask something."""
        body = {"model": "model", "messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True, **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def text(self, **fields: Any) -> str:
        """Ask something and return the answer."""
        answer: str = self.chat(**fields).raise_for_status().json()["choices"][0]["message"]["content"]
        return answer


@contextlib.contextmanager
def started(runtime: Path, *args: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start a command in another folder than that of its file; give it, and the file that gets its standard error."""
    errors = runtime / "stderr"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "foveate.cli", *args],
            cwd=runtime,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(runtime)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    with process:
        try:
            yield process, errors
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], start: str) -> str:
    """Return the first line that begins so."""
    assert process.stdout is not None
    return next(line.rstrip("\n") for line in process.stdout if line.startswith(start))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server file")
    make_certificate(folder / "tls", "IP:127.0.0.1,DNS:localhost")
    (folder / "secrets").mkdir()
    (folder / "secrets" / "keys").write_text(f"# spare ones\n\n{KEYS[1]}\n  {KEYS[2]}\n")
    file = folder / "server.yml"
    file.write_text(SETTINGS)
    trust = ssl.create_default_context(cafile=str(folder / "tls" / "cert.pem"))
    with tempfile.TemporaryDirectory(dir="/tmp") as name, started(Path(name), "serve", str(file)) as (process, errors):
        url = wait_for(process, READY).split()[3]
        curl = wait_for(process, "curl ")
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        with httpx.Client(base_url=url, verify=trust, headers=headers, timeout=60) as client:
            yield Running(folder, Path(name), url, curl, client)
        # What is written down went to the files.
        assert errors.read_text() == ""


def test_it_speaks_https_only(running: Running) -> None:
    assert running.url.startswith("https://127.0.0.1:")
    assert running.client.get("/ready").json() == {"status": "ready"}
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{running.url}/ready")
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{running.url.replace('https', 'http')}/ready")


def test_the_printed_command_runs_as_it_is(running: Running) -> None:
    assert f"--cacert '{running.folder}/tls/cert.pem' https://127.0.0.1:" in running.curl
    answers = [
        subprocess.run(
            ["sh", "-c", running.curl],
            env={**os.environ, "FOVEATE_API_KEY": keys},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for keys in (KEYS[1], f"{KEYS[0]},{KEYS[1]}")
    ]
    for answer in answers:
        assert json.loads(answer)["object"] == "chat.completion"


@pytest.mark.parametrize("key", KEYS)
def test_any_key_is_good(running: Running, key: str) -> None:
    assert running.client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize("key", ["first", "first key,key-2", "key-2\tkey-3", "# spare ones", "Key-3"])
def test_anything_else_is_no_key(running: Running, key: str) -> None:
    answer = running.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 401


def test_secrets_are_not_written_down(running: Running) -> None:
    (file,) = running.runtime.glob("foveate-*/settings.json")
    written = file.read_text()
    assert '"log_dir"' in written
    assert not [key for key in KEYS if key in written]


# What OpenAI's client sends from a browser.
ASKED = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-retry-count"


def preflight(running: Running, origin: str) -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": ASKED,
        # A browser sends no key with this.
        "authorization": "",
    }
    return running.client.options("/v1/chat/completions", headers=headers)


def test_a_named_site_may_ask(running: Running) -> None:
    permission = preflight(running, ORIGIN)
    assert permission.status_code == 200
    assert permission.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in permission.headers["access-control-allow-methods"]
    allowed = {name.strip().lower() for name in permission.headers["access-control-allow-headers"].split(",")}
    assert set(ASKED.split(",")) <= allowed
    answer = running.client.get("/v1/models", headers={"origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
    # Its page has to be able to read what is wrong.
    refused = running.client.get("/v1/models", headers={"origin": ORIGIN, "authorization": "Bearer wrong"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)


@pytest.mark.parametrize("origin", ["https://evil.example", "https://chat.example.com.evil.example", "null"])
def test_another_site_may_not(running: Running, origin: str) -> None:
    refused = preflight(running, origin)
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    answer = running.client.get("/v1/models", headers={"origin": origin})
    assert "access-control-allow-origin" not in answer.headers


def test_answers_are_as_the_file_says_unless_the_request_says(running: Running) -> None:
    greedy = running.text()
    assert running.text() == greedy
    assert running.text(temperature=0) == greedy
    # The checkpoint's own temperature is not 0, and this request's is not either.
    hot = {running.text(temperature=2, top_p=1, top_k=0, seed=seed) for seed in range(4)}
    assert len(hot | {greedy}) == 5
    usage = running.chat().json()["usage"]
    assert usage["completion_tokens"] == 6
    assert running.chat(max_tokens=9).json()["usage"]["completion_tokens"] == 9


def test_logs_are_files_of_json_that_are_put_aside(running: Running, eventually: Eventually) -> None:
    logs = running.folder / "logs"
    marks = [f"mark-{number:02}" for number in range(20)]
    for mark in marks:
        running.client.get("/health", headers={"x-request-id": mark})
    # The line is written once the answer has been sent.
    eventually(lambda: marks[-1] in (logs / "api.log").read_text())
    assert {path.name for path in logs.iterdir()} == {
        "api.log",
        "api.log.1",
        "api.log.2",
        "engine.log",
        "vision.log",
    }
    lines = [json.loads(line) for name in ("api.log.1", "api.log") for line in (logs / name).read_text().splitlines()]
    ids = [line["request_id"] for line in lines if line["request_id"].startswith("mark-")]
    assert ids == marks[-len(ids) :]
    assert {(line["process"], line["level"]) for line in lines} == {("api", "info")}
    loaded = [json.loads(line) for line in (logs / "engine.log").read_text().splitlines()]
    assert any(line["process"] == "engine" and "model loaded" in line["message"] for line in loaded)
    assert "vision encoder loaded" in (logs / "vision.log").read_text()


def test_one_file_for_a_server_and_its_vision_service(tmp_path: Path, eventually: Eventually) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "token").write_text("between us\n".replace(" ", "-"))
    file = tmp_path / "both.yaml"
    file.write_text(
        f"{COMMON}\nhttp: {{port: 0}}\nlogs: {{log_dir: logs}}\n"
        f"vision: {{encoder: none, listen: '{address}', vision: ['{address}'], vision_token_file: token}}\n"
    )
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as one,
        tempfile.TemporaryDirectory(dir="/tmp") as other,
        started(Path(one), "vision", str(file)) as (service, _),
    ):
        wait_for(service, VISION_READY)
        with started(Path(other), "serve", str(file)) as (server, _):
            url = wait_for(server, READY).split()[3]
            # Services that are not its own are not waited for.
            eventually(lambda: httpx.get(f"{url}/ready").json() == {"status": "ready"})
            content = [picture(1), {"type": "text", "text": "What is it?"}]
            body = {"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["api.log", "engine.log", "vision.log"]


# What is found before anything is started.


def failing(tmp_path: Path, settings: str) -> str:
    file = tmp_path / "server.yml"
    file.write_text(settings)
    result = subprocess.run(
        [sys.executable, "-m", "foveate.cli", "serve", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Loading" not in result.stdout
    return result.stderr.replace(f"{tmp_path}/", "")


def test_files_that_are_no_certificate_and_key(tmp_path: Path) -> None:
    make_certificate(tmp_path / "one", "DNS:localhost")
    make_certificate(tmp_path / "other", "DNS:localhost")
    encrypted = ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", str(tmp_path / "one" / "key.pem")]
    subprocess.run([*encrypted, "-out", str(tmp_path / "locked.pem")], check=True, capture_output=True)

    def told(cert: str, key: str) -> str:
        return failing(tmp_path, f"http: {{port: 0, tls_cert: {cert}, tls_key: {key}}}")

    assert told("one/cert.pem", "none.pem") == "error: --tls-key: none.pem cannot be read (No such file or directory)\n"
    for key in ("other/key.pem", "locked.pem", "one/cert.pem"):
        assert told("one/cert.pem", key).startswith(
            f"error: --tls-cert, --tls-key: one/cert.pem and {key} are not a certificate and its key, as PEM"
        )


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "keys cannot be read (No such file or directory)"),
        (b"\n# nothing\n", "keys holds no key"),
        (b"\xff\xfe", "keys is not text"),
        (b"good\nb\x00d\n", "keys holds a key that no header can carry"),
    ],
)
def test_a_file_without_keys(tmp_path: Path, contents: bytes | None, message: str) -> None:
    if contents is not None:
        (tmp_path / "keys").write_bytes(contents)
    told = failing(tmp_path, "http: {port: 0, api_key_file: keys}")
    assert told == f"error: --api-key-file: {message}\n"


def test_a_folder_for_logs_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = failing(tmp_path, "http: {port: 0}\nlogs: {log_dir: file}\n")
    assert told.startswith("error: --log-dir: file/api.log cannot be written (")
