"""What tests of several packages need: strict JAX, a tiny model on disk, commands in processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

# Workers of pytest-xdist keep to cores of their own. Threads of XLA, Numba and torch that wait for
# cores which other workers' threads hold made tests several times slower.
worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker and hasattr(os, "sched_setaffinity"):  # Linux has it
    cores = sorted(os.sched_getaffinity(0))
    number, count = int(worker[2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[number::count] or cores)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("dictlearn", "beartype.beartype")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def forget_compiled() -> Iterator[None]:
    """A file's compiled programs go with it: each holds 2 MB, and there are thousands."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def run_command() -> Command:
    """`run_command("package.module", *arguments, cwd=, **environment)`: (exit code, out, err)."""

    def run(
        module: str, *arguments: str | Path, cwd: Path | None = None, **environment: str
    ) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (d_model 16, 3 layers) with a byte-level tokenizer, as a HF directory."""
    torch = pytest.importorskip("torch", reason="the [lm] extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the [lm] extra is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        ["The quick brown fox jumps over the lazy dog, and the dog does not mind."] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # Padding that equals BOS, as in many models: a guessed attention mask would hide the BOS.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A KSVD run (24 atoms, 3 a token) on a store of the tiny model, beside its store and texts."""
    from activations.config import validate
    from activations.harvest import HarvestConfig, harvest
    from dictlearn.config import FitConfig
    from dictlearn.fit import fit

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "texts").mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        words = rng.choice(["fox", "lazy", "dog", "quick", "mind", "the"], 25)
        (folder / f"texts/{index:02}.txt").write_text(f"{index} {' '.join(words)}")
    (folder / "texts/odd.txt").write_text(
        "the <script>alert(1)</script> & \x07 the \u202e dog " * 3
    )
    hook = "blocks.1.hook_resid_post"
    table = {
        "store": str(folder / "store"),
        "model": f"dir:{tiny_model_dir}",
        "hooks": [hook],
        "context_length": 12,
        "corpus": {"kind": "files", "paths": [str(folder / "texts/*.txt")]},
    }
    harvest(validate(HarvestConfig, table, "test"))
    config = {
        "name": "small",
        "data": {"store": table["store"], "hook": hook, "test": 0.3},
        "solver": {"name": "ksvd", "n_atoms": 24, "encoder": {"name": "omp", "k": 3}},
        "fit": {"batch_size": 64, "epochs": 1},
        "output": str(folder / "run"),
    }
    return fit(validate(FitConfig, config, "test"))
