"""Arrays as others keep them to a Coder of ours, and what is known of it to a Run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dictlearn.artifact import ArtifactError, Run
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.activations import AbstractActivation
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.linear import Linear


def linear(
    *,
    w_enc: Float[np.ndarray, "d m"],
    b_enc: Float[np.ndarray, " m"],
    w_dec: Float[np.ndarray, "m d"],
    b_dec: Float[np.ndarray, " d"],
    centred: bool,
    activation: AbstractActivation,
) -> Coder:
    """codes = activation(x' W_enc + b_enc), x_hat = codes W_dec + b_dec.

    Our linear encoders see x - b_dec. So does x' where `centred`; elsewhere x' = x, and

        x W_enc + b_enc = (x - b_dec) W_enc + (b_enc + b_dec W_enc).
    """
    if not centred:
        b_enc = b_enc + np.einsum("d,dm->m", b_dec, w_enc, dtype=np.float64)
    weight = jnp.asarray(np.ascontiguousarray(w_enc.T))
    return raw(w_dec, b_dec, Linear(weight, jnp.asarray(b_enc, jnp.float32), activation))


def raw(
    atoms: Float[np.ndarray, "m d"], bias: Float[np.ndarray, " d"], encoder: AbstractEncoder
) -> Coder:
    """A Coder that sees raw activations: its normaliser changes nothing."""
    return Coder(
        Normaliser(jnp.zeros(len(bias), jnp.float32), jnp.ones((), jnp.float32)),
        Dictionary(jnp.asarray(atoms), jnp.asarray(bias)),
        encoder,
    )


def run(
    file: Path,
    coder: Coder,
    *,
    format: str,
    config: dict[str, Any],
    hook: str | None = None,
    model: str | None = None,
    context_length: int | None = None,
    prepend_bos: bool | None = None,
) -> Run:
    """The Run of a file of another's; what is not known is None.

    Raises:
      ArtifactError: its codes would have more nonzeros than there are atoms.
    """
    if isinstance(coder.encoder, Linear):
        try:
            coder.encoder.activation.check(len(coder.encoder.weight))
        except ValueError as error:
            raise ArtifactError(f"{file}: {error}") from None
    metadata = {
        "format": format,
        "hook": hook,
        "model": {"name": model},
        "context_length": context_length,
        "prepend_bos": prepend_bos,
        "source config": config,
    }
    return Run(file.parent, coder, metadata, {})
