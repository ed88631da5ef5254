"""A language model with its tokenizer, that can be given other rows and made to speak."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activations.huggingface import float32_weights, our_errors, quiet
from dictlearn.transplant.run import Pair
from dictlearn.transplant.vocabulary import Vocabulary, read_vocabulary


@dataclasses.dataclass(frozen=True)
class Speaker:
    """As a Hugging Face directory has them.

    Attributes:
      begin: ids that its tokenizer puts before every text.
    """

    model: Any
    vocabulary: Vocabulary
    begin: list[int]

    @classmethod
    def load(cls, directory: Path) -> Speaker:
        """In float32, on the fastest device there is."""
        with our_errors(str(directory)), quiet():
            model = float32_weights(str(directory), directory, local_files_only=True)
        vocabulary = read_vocabulary(directory)
        whole = vocabulary.tokenizer.encode("a").ids
        begin = list(itertools.takewhile(lambda token: token in vocabulary.special, whole))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device).eval(), vocabulary, begin)

    def put(self, pair: Pair, tensors: dict[str, np.ndarray]) -> None:
        """Have other rows in the embedding and the head."""
        ends = {pair.base.embed: self.model.get_input_embeddings()}
        head = self.model.get_output_embeddings()
        for name, rows in tensors.items():
            place = ends.get(name, head)
            parameter = place.bias if name == pair.base.bias else place.weight
            parameter.data = torch.from_numpy(rows).to(parameter)

    def go_on(self, prompt: str, count: int) -> str:
        """What it says next, greedily; the prompt is not repeated."""
        ids = [*self.begin, *self.vocabulary.encode(prompt)]
        x = torch.tensor([ids], device=self.model.device)
        with quiet(), torch.inference_mode():
            said = self.model.generate(x, max_new_tokens=count, do_sample=False)[0, len(ids) :]
        return self.vocabulary.tokenizer.decode(said.tolist())
