"""``foveate config``: what the settings are, where each came from, and what a file of them may hold."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from foveate.config import Settings
from foveate.deploy.fields import Origin, flags, value_of
from foveate.deploy.flags import configuration_command
from foveate.deploy.settings_file import documented_yaml
from foveate.deploy.sources import Configuration, shown
from foveate.errors import ConfigError

app = App(
    name="config",
    help="Show the settings and where they come from.",
    result_action="return_value",
)


def show(configuration: Configuration, as_json: bool = False, as_yaml: bool = False) -> int:
    """Show the settings that a server would have: give the flags, variables and files that it would get.

    Secrets are not shown.

    Args:
        configuration: what was given, validated.
        as_json: for programs.
        as_yaml: as a file for --settings, with a comment for each setting.
    """
    if as_json and as_yaml:
        raise ConfigError("--json, --yaml: give one of them")
    if as_json:
        print(json.dumps(_values(configuration), indent=2, ensure_ascii=False))
    elif as_yaml:
        print(documented_yaml(configuration.settings), end="")
    else:
        Console().print(_table(configuration))
    return 0


def _values(configuration: Configuration) -> dict[str, dict[str, dict[str, Any]]]:
    """Return each section's fields with their values and where these came from."""
    values: dict[str, dict[str, dict[str, Any]]] = {section: {} for section in Settings.model_fields}
    for flag in flags():
        origin = configuration.origin(flag)
        values[flag.section][flag.field] = {
            "value": shown(flag, value_of(configuration.settings, flag)),
            "from": origin.kind,
            "name": None if origin.kind == "default" else origin.name,
            "line": origin.line,
        }
    return values


def _table(configuration: Configuration) -> Table:
    table = Table(*(Column(name, overflow="fold") for name in ("setting", "value", "from")))
    section = None
    for flag in flags():
        if section not in (None, flag.section):
            table.add_section()
        section = flag.section
        origin = configuration.origin(flag)
        value = _text(shown(flag, value_of(configuration.settings, flag)))
        style = "dim" if origin.kind == "default" else "bold"
        table.add_row(*(Text(cell, style) for cell in (flag.key, value, _words(origin))))
    return table


def _text(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _words(origin: Origin) -> str:
    return str(origin) if origin.kind != "file" else f"{origin.name.split(': ')[0]}, line {origin.line}"


def _switch(name: str, flag: str, help_text: str) -> inspect.Parameter:
    annotation = Annotated[bool, Parameter(name=flag, negative=(), help=help_text)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


app.command(
    configuration_command(
        show,
        extra=[
            _switch("as_json", "--json", "Print JSON."),
            _switch("as_yaml", "--yaml", "Print a file for --settings, with a comment for each setting."),
        ],
    ),
    name="show",
    help="Show the settings that a server would have, and where each comes from.",
)


@app.command
def schema() -> int:
    """Print the JSON schema of the file that --settings takes, for editors."""
    print(json.dumps(settings_schema(), indent=2, ensure_ascii=False))
    return 0


def settings_schema() -> dict[str, Any]:
    """Return the JSON schema of the YAML file."""
    made = Settings.model_json_schema()
    for section in made["properties"].values():
        # It is said for each field already; and a section may be there without any.
        del section["default"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made,
        "title": "Settings of Foveate",
    }
