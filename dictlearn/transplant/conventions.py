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
        holder = config.get("text_config", config)
        if "vocab_size" in config:
            config["vocab_size"] = rows
        holder["vocab_size"] = rows
        _write(out / "config.json", config)
        if (base / "generation_config.json").exists():
            held = self._renumbered(table(base / "generation_config.json"))
            _write(out / "generation_config.json", held)
        if not self._new(config.get("eos_token_id")) and holder.get("eos_token_id") is None:
            self.warnings.append(
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

    def _new(self, ids: Any) -> list[int]:
        """Ids of the new vocabulary for one or several of the base's."""
        one = [ids] if isinstance(ids, int) else ids or []
        return [new for old in one for new in self.ids.get(old, [])]

    def _renumbered(self, held: dict[str, Any]) -> dict[str, Any]:
        """A config with ids of the new vocabulary; what has none there is left out."""
        new: dict[str, Any] = {}
        for key, value in held.items():
            if isinstance(value, dict):
                new[key] = self._renumbered(value)
            elif not re.search("_token_ids?$", key) or value is None:
                new[key] = value
            elif key == "pad_token_id" and "pad" in self._matching.donor.roles:
                new[key] = self._matching.donor.roles["pad"]
            elif ids := self._new(value):
                several = isinstance(value, list) or (key == "eos_token_id" and len(ids) > 1)
                new[key] = ids if several else ids[0]
            else:
                self.warnings.append(
                    f"{key} {value} of the base has no token in the new vocabulary"
                )
        return new

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
                self.warnings.append(
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
                self.warnings.append(
                    "the donor's chat template is left out: the base model has learned none"
                )
            return
        for token in sorted(base.special, key=lambda token: -len(base.special[token])):
            text = base.special[token]
            if text in template:
                if token in self.ids:
                    template = template.replace(text, donor.text(self.ids[token][0]))
                else:
                    self.warnings.append(
                        f"the chat template writes {text!r}, which is no token of the new "
                        "vocabulary. Name one under [overrides]"
                    )
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
