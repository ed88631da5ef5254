"""What a solver is."""

import abc
from typing import Annotated, ClassVar, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.matryoshka_omp import MatryoshkaOMP
from dictlearn.encoders.mp import MP
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.omp import OMP

State = TypeVar("State")

# The encoders that a config may name for a solver that codes with a pursuit.
Pursuit = Annotated[OMP | NonNegativeOMP | MP | MatryoshkaOMP, Field(discriminator="name")]


class Batch(eqx.Module):
    """Normalised rows, and the loss gradient at them where a solver needs it."""

    x: Float[Array, "n d"]
    gradient: Float[Array, "n d"] | None = None


class Info(eqx.Module):
    """What one step tells, the same fields for every solver, all measured before the update.

    `objective` is the mean of ||x - x_hat||^2 over the batch's rows; `fvu` divides it by their
    variance about the batch's own mean (NaN or infinite where they do not vary); `dead` counts
    atoms that have not been used for `dead_after` rows, this batch's included.
    """

    objective: Float[Array, ""]
    fvu: Float[Array, ""]
    l0: Float[Array, ""]
    dead: Int[Array, ""]


class AbstractSolver(eqx.Module, Generic[State]):
    """Frozen hyperparameters. `step` is pure, and jits its own kernels.

    Attributes:
      needs: "gradient": batches carry the loss gradient. "all rows": every batch is the whole
        training data, in one order, at most `max_rows` (a field of such solvers) rows.
      usual_hook: what the names of the hooks end with that the solver is meant for.
    """

    n_atoms: eqx.AbstractVar[int]
    needs: ClassVar[frozenset[str]] = frozenset()
    usual_hook: ClassVar[str] = ""

    @property
    @abc.abstractmethod
    def control(self) -> AbstractEncoder:
        """What codes the control: untrained atoms at the same sparsity."""

    @property
    def aim(self) -> int | None:
        """Nonzeros a row, on average, that codes should come to; None: however many.

        States whose codes of the validation rows have more than 1.1 times as many are never best
        while there is one that does not: a low error would only have been bought.
        """
        return None

    @abc.abstractmethod
    def init(
        self,
        sample: Float[Array, "n d"],
        *,
        n_steps: int,
        key: Key[Array, ""],
        start: Dictionary | None = None,
    ) -> State:
        """The state before the first step, from normalised training rows.

        Arguments:
          n_steps: how many steps there will be, for schedules.
          start: where to begin, instead of where the solver would; any norms.

        Raises:
          ValueError: the sample does not suffice, e.g. fewer rows than atoms.
        """

    @abc.abstractmethod
    def step(self, state: State, batch: Batch, *, key: Key[Array, ""]) -> tuple[State, Info]:
        """One update from one batch."""

    @abc.abstractmethod
    def result(self, state: State) -> tuple[Dictionary, AbstractEncoder]:
        """What was learned."""

    @abc.abstractmethod
    def check(self) -> None:
        """Rules that join hyperparameters. Raises ValueError naming the field."""

    @abc.abstractmethod
    def memory_bytes(self, batch_size: int, width: int) -> int:
        """About how many bytes a step needs at once, for the dry run."""

    def data_rows(self, sample: Float[Array, "n d"], *, key: Key[Array, ""]) -> Array:
        """A start that many solvers share: random rows of the sample at unit norm [m d].

        Raises:
          ValueError: there are fewer rows than atoms.
        """
        if len(sample) < self.n_atoms:
            raise ValueError(
                f"n_atoms: {self.n_atoms:,} atoms are begun from as many training rows, but there "
                f"are only {len(sample):,}. Use fewer atoms, harvest more text, or begin elsewhere "
                '(ksvd: start = "random").'
            )
        return unit_rows(
            sample[jax.random.choice(key, len(sample), (self.n_atoms,), replace=False)]
        )


def unit_rows(rows: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows at unit norm; a zero row becomes the first axis, so that every row has unit norm."""
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    axis = jnp.zeros_like(rows).at[:, 0].set(1)
    return jnp.where(norms > 0, rows / jnp.where(norms > 0, norms, 1), axis)


def check_pursuit(encoder: Pursuit, n_atoms: int) -> None:
    """Whether a solver's encoder suits its dictionary. Raises ValueError naming the field."""
    try:
        encoder.check()
        encoder.capacity(n_atoms, n_atoms)
    except ValueError as error:
        raise ValueError(f"encoder.{error}") from None


@jax.jit
def measure(
    x: Float[Array, "n d"], codes: SparseCodes, atoms: Float[Array, "m d"]
) -> tuple[Info, Float[Array, " m"]]:
    """What a step tells (`dead` is left to the solver), and each atom's energy, sum_n z_nj^2."""
    objective = jnp.mean(jnp.sum((x - codes.decode(atoms)) ** 2, axis=1))
    variance = jnp.mean(jnp.sum((x - x.mean(axis=0, keepdims=True)) ** 2, axis=1))
    energy = jnp.zeros(len(atoms), x.dtype).at[codes.indices].add(codes.values**2)
    info = Info(objective, objective / variance, codes.l0().mean(dtype=x.dtype), jnp.array(0))
    return info, energy
