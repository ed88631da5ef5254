"""Another encoder on a run's dictionary: what is lost by how codes are found, not by the atoms."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from activations.config import read_toml, validate
from activations.terminal import UserError
from dictlearn import heldout
from dictlearn.artifact import Run, load
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.linear import REGRESS_ROWS

if TYPE_CHECKING:
    from dictlearn.loop import Job
    from dictlearn.solvers.sae import Variant


def recode(
    run: Run | Path | str,
    encoder: AbstractEncoder,
    *,
    part: Literal["test", "validation"] = "test",
) -> Run:
    """The run with another encoder on its dictionary, measured anew on its held-out rows.

    Arguments:
      encoder: an array-free one, such as OMP(k=32), or one that was learned on this dictionary.
      part: which of the run's held-out rows. To choose an encoder, use "validation".

    Returns:
      a run that stands nowhere on disk: `coder` has the new encoder, `metrics` its figures on
      those rows (as in metrics.json; not the control's, nor how it was fitted).

    Raises:
      UserError: the run's store is missing, or is not the one that it was fitted on.
      ValueError: the encoder does not suit the dictionary, e.g. its k is above the atoms.
    """
    run = run if isinstance(run, Run) else load(run)
    job = job_of(run)
    coder = eqx.tree_at(lambda coder: coder.encoder, run.coder, encoder)
    seen = heldout.evaluate(coder, job.parts[part], job.bulk)
    metrics = heldout.figures(coder, seen, seed=job.config.seed)
    return dataclasses.replace(run, coder=coder, metrics=metrics)


def fit_encoder(
    run: Run | Path | str,
    variant: Variant,
    *,
    epochs: float = 10.0,
    learning_rate: float = 3e-3,
    batch_size: int = 1024,
    output: Path | None = None,
    overwrite: bool = False,
) -> AbstractEncoder:
    """A linear encoder distilled onto a run's dictionary, whose atoms and bias stay as they are.

        codes = activation((x - b) W^T + c),    W, c = argmin sum ||x - x_hat||^2

    begun from the ridge regression of the codes that OMP finds (non-negative OMP where the variant
    has no negative codes), and trained by Adam as an SAE is, with validation rows to keep the best.
    This is the fair linear encoder for a dictionary that was not trained with one; D^T x is not.

    Arguments:
      variant: of dictlearn.solvers.sae_variants, e.g. AbsTopK(k=32).
      epochs: over the run's training rows. 0: the regression alone, which knows codes and not rows.
      output: where the fit that does this lies; a fresh runs/<name>-encoder-NNN if left out.
      overwrite: replace the run at `output`.

    Raises:
      UserError: as `recode`; the fit fails; `output` is the run itself, or in the way.
      ValueError: the variant does not suit the dictionary, or has a number that only batches tell
        (BatchTopK's threshold, the gradient's scale) and there are no epochs.
    """
    from dictlearn.config import LoopConfig
    from dictlearn.fit import fit
    from dictlearn.solvers.sae import SAE
    from dictlearn.solvers.sae_variants import BatchTopK, GradientTopK

    run = run if isinstance(run, Run) else load(run)
    job = job_of(run)
    dictionary = run.coder.dictionary
    solver = SAE(
        n_atoms=len(dictionary.atoms),
        variant=variant,
        frozen=True,
        learning_rate=learning_rate,
        aux_weight=0.0,
    )
    if output is not None and output.resolve() == run.path.resolve():
        raise UserError(f"output: {output} is the run whose dictionary is to be kept")
    if epochs == 0:
        if isinstance(variant, (BatchTopK, GradientTopK)):
            raise ValueError(f"epochs: 0, but a {variant.name} encoder is made by batches")
        sample = job.train.sample(REGRESS_ROWS, seed=job.config.seed)
        x = run.coder.normaliser.normalise(jnp.asarray(sample))
        state = solver.init(x, n_steps=1, key=jax.random.key(0), start=dictionary)
        return solver.result(state)[1]
    config = dataclasses.replace(
        job.config,
        name=f"{job.config.name}-encoder",
        solver=solver,
        start=run.path,
        output=output,
        fit=LoopConfig(batch_size=batch_size, epochs=epochs),
    )
    return load(fit(config, where=f"encoder of {run.path}", overwrite=overwrite)).coder.encoder


def job_of(run: Run) -> Job:
    """The data of a finished run, split as they were for it.

    Raises:
      UserError: the store is missing, or is not the one that the run was fitted on.
    """
    from dictlearn.config import FitConfig
    from dictlearn.fit import prepare

    file = run.path / "config.toml"
    config = validate(FitConfig, read_toml(file, []), str(file))
    job = prepare(dataclasses.replace(config, harvest=None), str(file))
    run.check_store(job.store.path, job.store.manifest.sha256())
    return job
