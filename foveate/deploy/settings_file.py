"""The YAML file with the settings of a whole service: its sections are those of :class:`foveate.config.Settings`.

Reading is strict: a key that is there twice, or that nobody knows, is an error. Relative paths are relative to the
file, so that a folder with its settings can be moved.
"""

from __future__ import annotations

import difflib
import os
import textwrap
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from foveate.config import Settings
from foveate.deploy.fields import Flag, Given, Origin, flags, value_of
from foveate.errors import ConfigError

SUFFIXES = (".yml", ".yaml")
_WIDTH = 100


class _Loader(yaml.SafeLoader):
    """The safe loader, without its habit of taking the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping whose keys differ."""
        seen: set[object] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper, without its habit of losing the rarer line breaks in single quotes."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def read_settings_file(path: Path) -> dict[str, Given]:
    """Read what a file says, by field name; only names and the file's form are checked.

    Raises:
        ConfigError: it cannot be read, is no YAML, or has a key that does not exist. The message has one line for each
            such key, which names the file, the key and the nearest one that exists.
    """
    node, sections = _load(path)
    known = {flag.key: flag for flag in flags()}
    lines = {
        f"{section.value}.{key.value}": key.start_mark.line + 1
        for section, content in (node.value if isinstance(node, yaml.MappingNode) else ())
        if isinstance(content, yaml.MappingNode)
        for key, _ in content.value
    }
    given: dict[str, Given] = {}
    problems: list[str] = []
    for section, content in sections.items():
        if section not in Settings.model_fields:
            problems.append(f"{path}: {section}: there is no such section{_nearest_section(str(section))}")
        elif not isinstance(content, dict | None):
            problems.append(f"{path}: {section}: got {content!r}, expected a section: keys with values")
        else:
            for field, value in (content or {}).items():
                key = f"{section}.{field}"
                origin = Origin("file", f"{path}: {key}", lines.get(key))
                if (flag := known.get(key)) is None:
                    problems.append(f"{origin}: there is no such setting{nearest_key(str(section), str(field))}")
                else:
                    given[flag.field] = Given(anchored(flag, value, path.parent), origin)
    if problems:
        raise ConfigError("\n".join(problems))
    return given


def _load(path: Path) -> tuple[yaml.Node | None, dict[Hashable, Any]]:
    """Return the document as nodes, which know their lines, and as values.

    Raises:
        ConfigError: see :func:`read_settings_file`.
    """
    try:
        with path.open("rb") as file:
            loader = _Loader(file)
            try:
                node = loader.get_single_node()
                document = {} if node is None else loader.construct_document(node)
            finally:
                loader.dispose()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"{path}{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path}: is no YAML ({' '.join(str(error).split())})") from error
    if document is None:
        return node, {}
    if not isinstance(document, dict):
        names = ", ".join(Settings.model_fields)
        raise ConfigError(f"{path}: got {document!r:.80}, expected sections: {names}")
    return node, document


def _nearest_section(name: str) -> str:
    homes = [flag.key for flag in flags() if flag.field == name]
    return _suggestion(homes or difflib.get_close_matches(name, list(Settings.model_fields), 1))


def nearest_key(section: str, field: str) -> str:
    """Say which key may have been meant by one that does not exist; empty if none comes near."""
    fields = {flag.field: flag.key for flag in flags()}
    own = [flag.field for flag in flags() if flag.section == section]
    word = field.replace("-", "_").lower()
    near = [word] if word in fields else difflib.get_close_matches(word, own, 1)
    return _suggestion([fields[name] for name in near or difflib.get_close_matches(word, list(fields), 1)])


def _suggestion(keys: list[str]) -> str:
    return f"; did you mean {keys[0]}?" if keys else ""


def anchored(flag: Flag, value: Any, folder: Path) -> Any:
    """Make a relative path absolute, if the setting is one; whatever else it is stays.

    A model's name on the hub looks like a relative path: it is one if that folder exists, or if it begins with a dot.
    """
    if isinstance(value, list):
        return [anchored(flag, item, folder) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if flag.form == "address":
        path = value.removeprefix("unix:")
        return value if path in (value, "") else f"unix:{_absolute(path, folder)}"
    is_path = flag.form == "path" or (
        flag.form == "path-or-name" and (value[0] in "./~" or _absolute(value, folder).exists())
    )
    return str(_absolute(value, folder)) if is_path else value


def _absolute(path: str, folder: Path) -> Path:
    return Path(os.path.abspath(folder / os.path.expanduser(path)))


def dump_yaml(settings: Settings, explicit_only: bool, *, secrets: bool = True) -> str:
    """Write settings as YAML that :func:`foveate.deploy.sources.settings_from_file` reads back.

    Relative paths become absolute: the file may come to lie anywhere.

    Args:
        settings: what to write.
        explicit_only: leave out what nobody has set.
        secrets: write keys and tokens, too; without, they are left out.
    """
    sections: dict[str, dict[str, Any]] = {}
    for flag in flags():
        given = flag.field in getattr(settings, flag.section).model_fields_set
        if (given or not explicit_only) and (secrets or not flag.is_secret):
            value = anchored(flag, value_of(settings, flag), Path.cwd())
            sections.setdefault(flag.section, {})[flag.field] = value
    return _dump(sections)


def documented_yaml(settings: Settings) -> str:
    """Write every setting as YAML with a comment that says what it means. Secrets are left out."""
    return "\n".join(_documented_lines(settings)) + "\n"


def _documented_lines(settings: Settings) -> Iterator[str]:
    yield "# Settings of Foveate: foveate serve --settings FILE"
    for section, info in Settings.model_fields.items():
        yield ""
        yield f"# {(type(info.default).__doc__ or '').strip()}"
        yield f"{section}:"
        for flag in flags():
            if flag.section != section:
                continue
            for line in textwrap.wrap(flag.help, _WIDTH, break_on_hyphens=False):
                yield f"  # {line}"
            value = anchored(flag, value_of(settings, flag), Path.cwd())
            if flag.is_secret:
                yield f"  # {flag.field}: {'(set, but not shown)' if value else ''}".rstrip()
            else:
                # Under its section, because only the library knows where its text may be indented.
                yield _dump({section: {flag.field: value}}).partition("\n")[2].rstrip("\n")


def _dump(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
