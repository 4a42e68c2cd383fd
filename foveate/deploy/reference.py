"""``python -m foveate.deploy.reference > docs/configuration.md``: the page about the settings, made from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from foveate.config import Settings
from foveate.deploy.fields import Flag, flags
from foveate.deploy.mapping import INFERENCE, SERVER, Row

_MIB = 2**20

INTRODUCTION = """\
# Configuration

<!-- Made by `make docs-reference` from foveate/config.py: change it there. -->

Every setting is a flag, an environment variable and a key of one YAML file for the whole service. What is given in
several places is taken from the first of:

1. the flag (`--max-seq-len 4096`),
2. the environment variable (`FOVEATE_MAX_SEQ_LEN=4096`; one that is empty counts as not set; lists are split at
   commas),
3. the YAML file (`engine:` with `max_seq_len: 4096`),
4. the limits of the engine directory, if the model is one; these are also the most that may be asked for,
5. the default.

```
foveate serve server.yml                         # the same as --settings server.yml or FOVEATE_SETTINGS=server.yml
foveate serve server.yml --port 8000
foveate vision --settings server.yml --listen unix:/run/foveate/eyes.sock
foveate config show server.yml --port 8000       # every value, and where it comes from; --json for programs
foveate config show --yaml > server.yml          # a file to begin with: every setting, with what it means
foveate config schema > foveate.schema.json      # for editors
```

## The file

"""

EXAMPLE = """\
# yaml-language-server: $schema=foveate.schema.json
model:
  model: ./minicpm-int8          # relative to this file
  served_model_name: minicpm-v
engine:
  max_batch_size: 8
  max_seq_len: 16384
  scheduler_policy: max_utilization
vision:
  vision_batch_size: 16
http:
  host: 0.0.0.0
  port: 9997
  api_key_file: secrets/api-keys
  cors_origins: [https://chat.example.com]
  tls_cert: tls/server.pem
  tls_key: tls/server.key
logs:
  log_dir: logs
  log_format: json
sampling:
  temperature: 0.2
  max_tokens: 1024
"""

RULES = """
- A section or key that does not exist is an error that names the nearest one that does, and so is a key that is
  there twice. A wrong value is an error that names the file, the key, its line, the value and what was expected.
  The command ends with exit code 2 before anything is started.
- Paths are relative to the file: folders of models, certificates, keys, the folders of `log_dir` and
  `allowed_media_path`, and unix sockets. `model` is a path if that folder exists or if it begins with a dot or a
  slash; otherwise a name on the hub.
- `null` stands for "not set" where the table has no default.
- Secrets (`api_key`, `vision_token`) are better kept in files of their own: `api_key_file`, `vision_token_file`.
  `config show` does not print them, and the server writes them nowhere.
- `foveate vision` takes the same file and reads the sections `model`, `vision`, `transport` and `logs`, and of
  `media` the limits on pictures.
"""

NOTES = {
    "http": """
With `tls_cert` and `tls_key` the server speaks HTTPS and nothing else; both files are checked before anything is
started. Of several keys any is good, so that one can be replaced while the old one is still in use. A browser's
page may use the server only if its site is among `cors_origins`; `*` lets every site in, and needs a key for that
reason.
""",
    "logs": """
`log_dir` gets `api.log`, `engine.log` and `vision.log`; a file that has reached `log_max_bytes` becomes
`api.log.1`, and what was that `api.log.2`. An object of `log_format: json` has `time` (UTC), `level`, `process`,
`logger`, `request_id`, `message` and, after an error, `exception`. What ends a process is on standard error in any
case.
""",
    "sampling": """
What a request says itself always wins. `temperature: 0` makes every answer exactly greedy; the checkpoint's own
repetition penalty then does not apply, the one that is set here does. `max_tokens` is no limit: a request may ask
for more.
""",
}

MAPPING = """
## Coming from TensorRT-LLM

A deployment with TensorRT-LLM usually has two files: `inference.yml` for the engines and `server.yml` for what is
around them. Both are one file here. Their names differ from one deployment to the next; these are the usual ones.
What is written `like this` and has no dot is a field of a request.
"""


def page() -> str:
    """Return the whole page as Markdown."""
    return "".join(_parts())


def _parts() -> Iterator[str]:
    yield f"{INTRODUCTION}```yaml\n{EXAMPLE}```\n{RULES}"
    for section, info in Settings.model_fields.items():
        yield f"\n## {section}\n\n{type(info.default).__doc__}\n\n"
        heads = ("key", "flag", "environment variable", "value", "default", "meaning")
        yield _table(heads, [_cells(flag) for flag in flags() if flag.section == section])
        yield NOTES.get(section, "")
    yield MAPPING
    for file, rows in (("inference.yml", INFERENCE), ("server.yml", SERVER)):
        yield f"\n### {file}\n\n"
        yield _table(("there", "here", "remarks"), [_mapped(row) for row in rows])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, ["---"] * len(heads), *rows))


def _cells(flag: Flag) -> tuple[str, ...]:
    name = f"`{flag.name}`, `--no-{flag.name[2:]}`" if flag.is_switch else f"`{flag.name}`"
    return f"`{flag.field}`", name, f"`{flag.environment}`", flag.expected, _default(flag), flag.help


def _default(flag: Flag) -> str:
    value: Any = flag.default
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    is_size = flag.field.endswith("_bytes") and value % _MIB == 0
    return f"`{value}` ({value // _MIB} MiB)" if is_size else f"`{value}`"


def _mapped(row: Row) -> tuple[str, ...]:
    there, here, remarks = row
    names = ", ".join(f"`{name}`" for name in there.split())
    return names, ", ".join(f"`{name}`" for name in here.split()) or "none", remarks


if __name__ == "__main__":
    print(page(), end="")
