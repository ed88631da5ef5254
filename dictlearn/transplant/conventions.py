"""Files beside the weights: the donor's tokenizer with the base model's conventions.

The body has learned what begins a text, what ends it and how a conversation is written; so which
special tokens stand around a text, the ids that generation begins and stops with, and the chat
template are the base's, in the new vocabulary's words.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from activations.terminal import UserError
from dictlearn.interop.files import table
from dictlearn.transplant.matching import Matching
from dictlearn.transplant.vocabulary import ROLES

_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json", "*.tiktoken",
)  # fmt: skip
_TEMPLATE = "chat_template.jinja"
# Settings that hold ids; and roles, which may be null. Strict classes refuse null of other ids.
_IDS = re.compile(
    r"_token_(ids?|index)$|suppress_tokens$|_words_ids$|^(sequence_bias|forced_decoder_ids)$"
)
_ROLE = re.compile(rf"^(forced_)?({'|'.join(ROLES)}|decoder_start)_token_id$")


class Conventions:
    """What becomes of the base's special tokens in the new vocabulary.

    Attributes:
      ids: ids of the new vocabulary that hold the row of a token of the base, by override and role
        before others.
      warnings: what could not be carried over.
    """

    def __init__(self, matching: Matching) -> None:
        self._matching = matching
        self.ids: dict[int, list[int]] = {}
        for own, other in matching.copied.items():
            self.ids.setdefault(other, []).append(own)
        self.warnings: list[str] = []

    def write(self, out: Path, rows: int) -> None:
        """Write tokenizer, config.json, generation_config.json and chat template into `out`."""
        base, donor = self._matching.base.directory, self._matching.donor.directory
        config = self._renumbered(table(base / "config.json"))
        holder = config.get("text_config") or config
        if "vocab_size" in config:
            config["vocab_size"] = rows
        holder["vocab_size"] = rows
        for role in ("bos", "eos", "pad"):
            if (key := f"{role}_token_id") not in holder:  # where the class has the same by itself
                old = self._matching.base.roles.get(role)
                holder[key] = None if old is None else self._renumbered_id(key, old)
        _write(out / "config.json", config)
        generation: dict[str, Any] = {}
        if (base / "generation_config.json").exists():
            generation = self._renumbered(table(base / "generation_config.json"))
            _write(out / "generation_config.json", generation)
        if all(held.get("eos_token_id") is None for held in (config, holder, generation)):
            self._warn(
                "no token of the new vocabulary has the row of the base's end of text: generation "
                "will not stop by itself. Name one under [overrides]"
            )
        for pattern in _TOKENIZER:
            for file in donor.glob(pattern):
                shutil.copyfile(file, out / file.name)
        for file in base.glob("*.py"):  # of a model whose code lies beside it
            shutil.copyfile(file, out / file.name)
        around = self._around()
        if (out / "tokenizer.json").exists():
            held = table(out / "tokenizer.json")
            held["post_processor"] = self._template_of_texts(*around)
            _write(out / "tokenizer.json", held)
        self._tokenizer_config(out, begins=bool(around[0]), ends=bool(around[1]))
        self._chat_template(out)

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)

    def _renumbered(self, held: dict[str, Any]) -> dict[str, Any]:
        """A config with ids of the new vocabulary."""
        new: dict[str, Any] = {}
        for key, value in held.items():
            if _IDS.search(key) and value is not None:
                new[key] = self._renumbered_id(key, value)
            else:
                new[key] = self._renumbered(value) if isinstance(value, dict) else value
        return new

    def _renumbered_id(self, key: str, value: Any) -> Any:
        """One or several ids in the new vocabulary; null, or -1 of one that is no role, for none.

        The key stays: without it the model's class would put an id of its own there, which is some
        other token of the new vocabulary.
        """
        if key == "pad_token_id" and "pad" in self._matching.donor.roles:
            return self._matching.donor.roles["pad"]
        ids: list[int] = []
        for old in value if isinstance(value, list) else [value]:
            new = self.ids.get(old, []) if isinstance(old, int) else []
            if not new:
                text = self._matching.base.text(old) if isinstance(old, int) else ""
                self._warn(
                    f"{key} {old}{f' ({text!r})' if text else ''} of the base has no token in the "
                    "new vocabulary"
                )
            ids += new
        if isinstance(value, list) or (key == "eos_token_id" and len(ids) > 1):
            return ids or None
        if ids:
            return ids[0]
        return -1 if isinstance(value, int) and not _ROLE.search(key) else None

    def _around(self) -> tuple[list[int], list[int]]:
        """Ids that the base's tokenizer puts before and behind a text, in the new vocabulary."""
        base = self._matching.base
        plain = base.encode("a")
        whole = base.tokenizer.encode("a").ids
        places = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        if not places:
            return [], []
        before, behind = whole[: places[0]], whole[places[0] + len(plain) :]
        for token in (*before, *behind):
            if token not in self.ids:
                self._warn(
                    f"{base.text(token)!r}, which the base's tokenizer puts around every text, has "
                    "no token in the new vocabulary. Name one under [overrides]"
                )
        first = [
            [self.ids[token][0] for token in part if token in self.ids] for part in (before, behind)
        ]
        return first[0], first[1]

    def _template_of_texts(self, before: list[int], behind: list[int]) -> dict[str, Any]:
        """The post_processor of a tokenizer.json that puts these around each text."""
        text = self._matching.donor.text

        def part(name: str, kind: int) -> list[dict[str, Any]]:
            return [
                *({"SpecialToken": {"id": text(token), "type_id": kind}} for token in before),
                {"Sequence": {"id": name, "type_id": kind}},
                *({"SpecialToken": {"id": text(token), "type_id": kind}} for token in behind),
            ]

        return {
            "type": "TemplateProcessing",
            "single": part("A", 0),
            "pair": [*part("A", 0), *part("B", 1)],
            "special_tokens": {
                text(token): {"id": text(token), "ids": [token], "tokens": [text(token)]}
                for token in {*before, *behind}
            },
        }

    def _tokenizer_config(self, out: Path, *, begins: bool, ends: bool) -> None:
        """The donor's, told to put around a text what tokenizer.json does."""
        base, donor = self._matching.base, self._matching.donor
        file = donor.directory / "tokenizer_config.json"
        held = table(file) if file.exists() else {}
        held.pop("chat_template", None)
        for role in ROLES:
            # An override may have given the base's to another token than the donor's own.
            known = self.ids.get(base.roles.get(role, -1), [])
            if role in donor.roles and (role == "pad" or not known):
                known = [donor.roles[role]]
            if known:
                held[f"{role}_token"] = donor.text(known[0])
        if (out / "tokenizer.json").exists():
            # A class of its own would build what stands around a text anew.
            held = {key: held[key] for key in held if key not in ("auto_map", "backend")}
            held["tokenizer_class"] = "PreTrainedTokenizerFast"
        held |= {"add_bos_token": begins, "add_eos_token": ends}
        _write(out / "tokenizer_config.json", held)

    def _chat_template(self, out: Path) -> None:
        """The base's, with its special tokens called what they are called now."""
        base, donor = self._matching.base, self._matching.donor
        template = _template(base.directory)
        if template is None:
            if _template(donor.directory) is not None:
                self._warn("the donor's chat template is left out: the base model has learned none")
            return
        words = {base.text(token): token for token in (*base.added, *base.special)}
        written = [text for text in words if text in template and not text.isspace()]

        def renamed(found: re.Match[str]) -> str:
            if new := self.ids.get(words[found[0]]):
                return donor.text(new[0])
            self._warn(
                f"the chat template writes {found[0]!r}, whose row no token of the new vocabulary "
                "has. Name one under [overrides]"
            )
            return found[0]

        if written:  # at once, longer ones first: a new name may be another's old one
            every = "|".join(re.escape(text) for text in sorted(written, key=len, reverse=True))
            template = re.sub(every, renamed, template)
        (out / _TEMPLATE).write_text(template, encoding="utf-8")


def _template(directory: Path) -> str | None:
    """A directory's chat template: a file of its own, or in tokenizer_config.json."""
    if (directory / _TEMPLATE).exists():
        return (directory / _TEMPLATE).read_text(encoding="utf-8")
    file = directory / "tokenizer_config.json"
    held = table(file).get("chat_template") if file.exists() else None
    if isinstance(held, list):  # several, by name
        held = {entry.get("name"): entry.get("template") for entry in held}.get("default")
    if held is not None and not isinstance(held, str):
        raise UserError(f"{file}: its chat_template is not a text")
    return held


def _write(file: Path, held: dict[str, Any]) -> None:
    file.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
