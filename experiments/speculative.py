"""A transplanted model drafts for a larger one:  python -m experiments.speculative TARGET DRAFT ...

Both have one tokenizer, so that the draft's tokens can be checked by the target in one forward. A
draft says `ahead` tokens greedily; the target keeps those that it would have said itself, and adds
one. The text is the target's own, whoever drafts. A JSON line a draft:

    acceptance   tokens kept / tokens drafted
    per_forward  tokens gained in each forward of the target (1 without a draft)

Controls: the target as its own draft (acceptance 1), and drafts by other methods.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activations.corpora import Files
from activations.terminal import UserError, progress, run_command
from dictlearn.metrics import bootstrap_mean
from evals.speaker import Speaker
from evals.transplant import EvalConfig


@torch.inference_mode()
def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """What a model says next."""
    x = torch.tensor([ids], device=model.device)
    said = model.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return said[0, len(ids) :].tolist()


def drafted(target: list[int], draft: Any, begin: list[int], ahead: int) -> tuple[int, int, int]:
    """Tokens kept, tokens drafted and forwards of the target, for a text that the target said."""
    place = kept = tried = forwards = 0
    while place < len(target):
        count = min(ahead, len(target) - place)
        guess = greedy(draft, [*begin, *target[:place]], count)
        same = next((i for i in range(count) if guess[i] != target[place + i]), count)
        kept, tried, forwards = kept + same, tried + count, forwards + 1
        place += same + 1  # the target's own word stands where the draft was wrong
    return kept, tried, forwards


def main() -> None:
    """Print a JSON line a draft."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speculative",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", type=Path)
    parser.add_argument("drafts", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True, help="its paragraphs begin the texts")
    parser.add_argument("--texts", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64, help="that the target says to each")
    parser.add_argument("--ahead", type=int, default=4)
    arguments = parser.parse_args()
    corpus = Files(kind="files", paths=(str(arguments.text),), documents_are="paragraphs")
    prompts = EvalConfig(corpus=corpus, documents=arguments.texts, characters=200).texts()
    target = Speaker.load(arguments.target)
    encode = target.vocabulary.encode
    prompts = [[*target.begin, *encode(text)] for text in prompts]
    said = [
        greedy(target.model, prompt, arguments.tokens)
        for prompt in progress(iterable=prompts, desc="target", unit="text")
    ]
    for path in arguments.drafts:
        draft = Speaker.load(path)
        if draft.vocabulary.tokens != target.vocabulary.tokens:
            raise UserError(f"{path}: has another vocabulary than {arguments.target}")
        found = np.array([
            drafted(own, draft.model, [*draft.begin, *prompt[len(target.begin) :]], arguments.ahead)
            for prompt, own in progress(
                iterable=list(zip(prompts, said, strict=True)), desc=path.name, unit="text"
            )
        ])  # fmt: skip
        kept, tried, forwards = found.T
        print(json.dumps({
            "target": arguments.target.name, "draft": path.name, "ahead": arguments.ahead,
            "acceptance": round(kept.sum() / tried.sum(), 4),
            "acceptance_interval": bootstrap_mean(kept, tried, seed=0),
            "per_forward": round(sum(map(len, said)) / forwards.sum(), 3),
            "tokens": int(sum(map(len, said))), "texts": len(said),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    run_command(main)
