"""How a tokenizer splits numbers: a model whose body learned one scheme reads another one badly."""

from __future__ import annotations

from dictlearn.transplant.vocabulary import Vocabulary

_NUMBERS = ("7", "42", "365", "1984", "31415", "271828", "1618033", "20250607", "987654321012")

_UNKNOWN = "unknown"
_WARNING = (
    "the two tokenizers split numbers in different ways: {donor} (donor) and {base} (base). In the "
    "paper of this method (arXiv 2506.06607) accuracy on GSM8K fell by 74 to 79 % then, and by 6 % "
    "where both have one way: expect wrong arithmetic"
)


def scheme(vocabulary: Vocabulary) -> str:
    """How numbers are split: "single digits", "groups of up to 3 from the left", ..., "irregular".

    A group's length is counted in digits; a token that holds no digit (a space) does not count.
    "unknown": the tokens do not hold all the digits, or there is no tokenizer.json to try.
    """
    if not (vocabulary.directory / "tokenizer.json").exists():
        return _UNKNOWN
    splits = {number: _split(vocabulary, number) for number in _NUMBERS}
    if any(sum(lengths) != len(number) for number, lengths in splits.items()):
        return _UNKNOWN
    longest = max(max(lengths, default=1) for lengths in splits.values())
    if longest == 1:
        return "single digits"
    whole = {number: [longest] * (len(number) // longest) for number in _NUMBERS}
    rest = {number: [len(number) % longest] if len(number) % longest else [] for number in _NUMBERS}
    if all(splits[number] == whole[number] + rest[number] for number in _NUMBERS):
        return f"groups of up to {longest} from the left"
    if all(splits[number] == rest[number] + whole[number] for number in _NUMBERS):
        return f"groups of up to {longest} from the right"
    return f"irregular pieces of up to {longest} digits"


def _split(vocabulary: Vocabulary, number: str) -> list[int]:
    """Digits in each token of a number."""
    tokens = vocabulary.encode(number)
    counts = [
        sum(chr(byte).isdigit() for byte in vocabulary.tokens.get(token, b"")) for token in tokens
    ]
    return [count for count in counts if count]


def schemes(donor: Vocabulary, base: Vocabulary) -> dict[str, str]:
    """Both models' schemes."""
    return {"donor": scheme(donor), "base": scheme(base)}


def warnings(told: dict[str, str]) -> list[str]:
    """What to say of two schemes, if both are known and they differ."""
    differ = len({*told.values()}) > 1 and _UNKNOWN not in told.values()
    return [_WARNING.format(**told)] if differ else []
