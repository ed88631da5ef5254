"""TOML to typed, frozen configuration, strictly.

A configuration type is a frozen dataclass (or Equinox module) with
`__pydantic_config__ = {"extra": "forbid"}`. No field is written twice: pydantic reads the
annotations. Rules that join several fields stand in the type's own `check()`, which raises
ValueError and starts its message with the dotted key.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from activations.terminal import UserError

T = TypeVar("T")


def read_toml(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The table in a TOML file, with overrides `section.key=value` written over it.

    Raises:
      UserError: the file is missing, is not TOML (the line is shown), or an override is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file. Ready ones are in experiments/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config file ({error}).") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {_toml_message(text, error)}") from None
    for override in overrides:
        _apply_override(table, override)
    return table


def _toml_message(text: str, error: tomllib.TOMLDecodeError) -> str:
    message = str(error)
    lines = text.splitlines()
    if "(at line " not in message:  # "(at end of document)" points nowhere a reader can look
        return f"{message}\n  {len(lines)} | {lines[-1] if lines else ''}"
    number = int(message.rsplit("(at line ", 1)[1].split(",")[0])
    return f"{message}\n  {number} | {lines[number - 1] if number <= len(lines) else ''}"


def _apply_override(table: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise UserError(f"--set {override}: expected section.key=value, e.g. --set fit.epochs=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # an unquoted string, as shells make natural
    for depth, key in enumerate(keys[:-1]):
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}: {'.'.join(keys[: depth + 1])} is not a section")
        table = inner
    table[keys[-1]] = value


def validate(kind: type[T], table: dict[str, Any], where: str, prefix: str = "") -> T:
    """`table` as an instance of `kind`, strictly: no unknown key, no coercion, all ranges kept.

    Arguments:
      where: what the messages call the source, usually the config's path.
      prefix: the dotted key of `table` inside that source, e.g. "harvest.".

    Raises:
      UserError: lists every offending dotted key with what was expected.
    """
    adapter = pydantic.TypeAdapter(kind)
    try:
        # JSON mode, since strict python mode refuses tables where it expects a dataclass.
        value = adapter.validate_json(json.dumps(table, default=str), strict=True)
        check = getattr(value, "check", None)
        if check is not None:
            check()
    except pydantic.ValidationError as error:
        schema = adapter.json_schema()
        lines = [_error_line(schema, item, prefix) for item in error.errors()]
        raise UserError(f"{where}:\n  " + "\n  ".join(lines)) from None
    except ValueError as error:
        raise UserError(f"{where}:\n  {prefix}{error}") from None
    return value


def _error_line(schema: dict[str, Any], item: Any, prefix: str) -> str:
    node, keys = _resolve(schema, schema), []
    parent = node
    for part in item["loc"]:
        parent = node
        node, is_key = _descend(schema, node, part)
        if is_key:
            keys.append(str(part))
    dotted = prefix + ".".join(keys)
    match item["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            parent_key = dotted.removesuffix(keys[-1])
            return f"{dotted}: unknown key.{_nearest(keys[-1], _names(schema, parent), parent_key)}"
        case "union_tag_invalid":
            known = [tag.strip("' ") for tag in item["ctx"]["expected_tags"].split(",")]
            key = item["ctx"]["discriminator"].strip("'")
            tag = item["ctx"]["tag"]
            return f"{dotted}.{key}: no {key} {tag!r}.{_nearest(tag, known)}"
        case "union_tag_not_found":
            return f"{dotted}: expected a table with {item['ctx']['discriminator']}"
        case "missing":
            return f"{dotted}: missing, and it has no default"
        case "dict_type" | "dataclass_type":
            return f"{dotted}: expected a table, got {item['input']!r}"
        case _:
            message = re.sub(r"^\w+ should (be|have) ", "expected ", item["msg"])
            return f"{dotted}: {message}, got {item['input']!r}"


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference of a JSON schema, and the one table of an optional value."""
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    tables = [option for option in node.get("anyOf", []) if option.get("type") != "null"]
    return _resolve(schema, tables[0]) if len(tables) == 1 else node


def _descend(
    schema: dict[str, Any], node: dict[str, Any], part: Any
) -> tuple[dict[str, Any], bool]:
    """One step of an error's location: the node below, and whether a user wrote this step."""
    if part in node.get("properties", {}):
        return _resolve(schema, node["properties"][part]), True
    mapping = node.get("discriminator", {}).get("mapping", {})
    if part in mapping:  # the tag of a union, e.g. solver.ksvd.encoder
        return _resolve(schema, {"$ref": mapping[part]}), False
    return {}, True


def _names(schema: dict[str, Any], node: dict[str, Any]) -> Iterator[str]:
    """Every key that may stand in this table, those of its inner tables dotted."""
    for key, inner in node.get("properties", {}).items():
        yield key
        inner = _resolve(schema, inner)
        for option in [inner, *inner.get("oneOf", [])]:
            for name in _names(schema, _resolve(schema, option)):
                yield f"{key}.{name}"


def _nearest(word: str, names: Iterable[str], prefix: str = "") -> str:
    known = list(names)
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    close = difflib.get_close_matches(word, by_last, n=3, cutoff=0.5)
    if close:
        return f" Did you mean {' or '.join(prefix + by_last[name] for name in close)}?"
    return f" Known here: {', '.join(name for name in known if '.' not in name)}."
