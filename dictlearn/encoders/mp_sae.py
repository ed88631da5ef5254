"""Matching pursuit as a sparse autoencoder's encoder, with the lengths of its atoms learned."""

from __future__ import annotations

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder, AbstractPrepared

# Rows coded at once: the correlations [tile m] should stay within a processor's cache.
_TILE = 256


class MPSAE(AbstractEncoder):
    """Non-negative matching pursuit over weights as they are. Learned.

    From r = x - b, b the dictionary's bias, and z = 0, in each round and for each row:

        j = argmax_i <r, w_i>,    a = max(<r, w_j>, 0),    z_j <- z_j + a,    r <- r - a w_j.

    Where all weights have unit norm this is matching pursuit with non-negative steps. Elsewhere
    norms count twice, in the choice and in the step (dictlearn.encoders.mp divides by them), and
    a norm above sqrt(2) makes the residual longer: they belong to the encoder that was learned.
    An atom may be taken again. A row is done after `rounds` rounds, when no <r, w_i> is positive,
    or by one of the two rules below, each looked at after a round.

    Arguments:
      weight: of a tied autoencoder, the atoms.
      rounds: the most rounds; a row has no more nonzeros.
      threshold: a row is done when ||r|| is below it, in units of normalised rows. 0: never.
      stop_on_repeat: a row is done once a round has brought no new atom; what that round added to
        an old one stays.

    Source: Costa et al., "From flat to hierarchical: extracting sparse representations with
    matching pursuit" (arXiv 2506.03093); the rules for stopping are those of SAELens 6.
    """

    weight: Float[Array, "m d"]
    rounds: int = eqx.field(static=True)
    threshold: float = eqx.field(static=True)
    stop_on_repeat: bool = eqx.field(static=True)
    name: Literal["mp_sae"] = eqx.field(static=True, default="mp_sae")

    def prepare(self, dictionary: Dictionary) -> AbstractPrepared:
        """Nothing to prepare but the place of the dictionary's bias."""
        return PreparedMPSAE(dictionary.bias, self)


class PreparedMPSAE(AbstractPrepared):
    """The encoder with its dictionary's bias."""

    bias: Float[Array, " d"]
    encoder: MPSAE

    def encode(
        self, x: Float[Array, "n d"], *, gradient: Float[Array, "n d"] | None = None
    ) -> SparseCodes:
        """Codes of normalised rows."""
        del gradient
        return _encode(self, x)


@eqx.filter_jit
def _encode(prepared: PreparedMPSAE, x: Float[Array, "n d"]) -> SparseCodes:
    """All rows, a tile after another."""
    n, d = x.shape
    tile = max(1, min(_TILE, n))
    padded = jnp.pad(x - prepared.bias[None], ((0, -n % tile), (0, 0)))
    indices, values = jax.lax.map(
        lambda rows: _tile(prepared.encoder, rows), padded.reshape(-1, tile, d)
    )
    k = indices.shape[-1]
    return SparseCodes(
        indices.reshape(-1, k)[:n],  # [n k]
        values.reshape(-1, k)[:n],
        n_atoms=len(prepared.encoder.weight),
    )


def _tile(encoder: MPSAE, x: Float[Array, "n d"]) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
    """Indices and values for some rows without the bias; traced."""
    weight, n = encoder.weight, len(x)
    k = min(encoder.rounds, len(weight))
    rows, slots = jnp.arange(n), jnp.arange(k, dtype=jnp.int32)[None]

    def choose(state: tuple[Array, ...]) -> tuple[Array, ...]:
        round_, indices, values, count, residual, active = state
        new = jnp.argmax(residual @ weight.T, axis=1).astype(jnp.int32)
        move = jnp.sum(residual * weight[new], axis=1)
        active &= move > 0  # else no later round would change anything
        move = jnp.where(active, move, 0)
        held = (indices == new[:, None]) & (slots < count[:, None])
        again = held.any(axis=1)
        slot = jnp.where(again, jnp.argmax(held, axis=1).astype(jnp.int32), count)
        slot = jnp.minimum(slot, k - 1)  # of a row that is done, whose move is 0
        indices = indices.at[rows, slot].set(jnp.where(active, new, indices[rows, slot]))
        residual = residual - move[:, None] * weight[new]
        count += (active & ~again).astype(count.dtype)
        if encoder.stop_on_repeat:
            active &= ~again
        if encoder.threshold > 0:
            active &= jnp.linalg.norm(residual, axis=1) >= encoder.threshold
        return round_ + 1, indices, values.at[rows, slot].add(move), count, residual, active

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((n, k), jnp.int32),
        jnp.zeros((n, k), x.dtype),
        jnp.zeros(n, jnp.int32),
        x,
        jnp.ones(n, bool),
    )
    _, indices, values, *_ = jax.lax.while_loop(
        lambda state: (state[0] < encoder.rounds) & state[-1].any(), choose, start
    )
    return indices, values
