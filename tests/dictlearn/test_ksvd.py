"""KSVD's atom update against numpy's SVD, and its laws: descent, an exact residual, dead atoms."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from dictlearn.codes import SparseCodes
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.omp import OMP
from dictlearn.solvers import ksvd, ksvd_cpu
from dictlearn.solvers.base import Batch, unit_rows
from dictlearn.solvers.ksvd import KSVD

KEY = jax.random.key(0)
M, D, N = 12, 8, 200

SWEEPS = {"one by one": ksvd_cpu.sweep, "batched": ksvd._sweep}


@pytest.fixture(params=SWEEPS)
def sweep(request: pytest.FixtureRequest) -> Callable[..., tuple[jax.Array, jax.Array]]:
    return SWEEPS[request.param]


@dataclasses.dataclass
class Problem:
    """Rows x [n d] coded by z [n m] over unit atoms [m d]."""

    x: np.ndarray
    z: np.ndarray
    atoms: np.ndarray

    @property
    def residual(self) -> np.ndarray:
        return self.x - self.z @ self.atoms

    @property
    def codes(self) -> SparseCodes:
        indices = np.tile(np.arange(M, dtype=np.int32), (len(self.z), 1))
        return SparseCodes(jnp.asarray(indices), jnp.asarray(self.z), n_atoms=M)

    def update(
        self,
        sweep: Callable[..., tuple[jax.Array, jax.Array]],
        order: list[int],
        *,
        history: float = 0,
        encoder: type = OMP,
        **settings: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Atoms and residual after a sweep over these atoms, in one chunk unless told otherwise."""
        solver = KSVD(M, encoder(k=1), **{"chunk_size": len(order), **settings})
        atoms, residual = sweep(
            solver,
            jnp.asarray(self.atoms),
            jnp.asarray(self.residual),
            self.codes,
            jnp.full(M, history, self.x.dtype),
            jnp.asarray(order),
        )
        assert residual.dtype == self.x.dtype
        return np.asarray(atoms), np.asarray(residual)


def random_problem(density: float, dtype: type = np.float32, seed: int = 0) -> Problem:
    """Codes that are not the best for their atoms, as for atoms that have just moved."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((M, D))
    z = rng.standard_normal((N, M)) * (rng.random((N, M)) < density)
    x = z @ atoms + rng.standard_normal((N, D))
    return Problem(*(a.astype(dtype) for a in (x, z, np.asarray(unit_rows(jnp.asarray(atoms))))))


def sparse(dtype: type) -> Problem:
    return random_problem(0.2, dtype)


def all_active(dtype: type) -> Problem:
    return random_problem(1.0, dtype)


def duplicate_atoms(dtype: type) -> Problem:
    """Every row uses one atom and its copy alike, so that their joint full step overshoots."""
    problem = random_problem(0.3, dtype)
    problem.atoms[1::2] = problem.atoms[::2]
    problem.z[:, 1::2] = problem.z[:, ::2]
    return problem


def one_direction(dtype: type) -> Problem:
    """Rows with a common mean many times their spread, used by all atoms."""
    problem = random_problem(1.0, dtype)
    problem.x += 100 * problem.x[:1]
    return problem


def huge_row(dtype: type) -> Problem:
    problem = random_problem(0.3, dtype)
    problem.x[0] *= 1000
    return problem


HARD = [sparse, all_active, duplicate_atoms, one_direction, huge_row]


@pytest.mark.parametrize("power_steps", [1, 3])
@pytest.mark.parametrize("chunk_size", [1, 4, M])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("hard", HARD)
def test_chunks_never_raise_the_objective_and_keep_the_residual_exact(
    sweep: Callable[..., tuple[jax.Array, jax.Array]],
    hard: Callable[[type], Problem],
    dtype: type,
    chunk_size: int,
    power_steps: int,
) -> None:
    epsilon = np.finfo(dtype).eps
    solver = KSVD(M, OMP(k=1), chunk_size=chunk_size, power_steps=power_steps)
    with jax.enable_x64(dtype is np.float64):
        problem = hard(dtype)
        atoms, residual = jnp.asarray(problem.atoms), jnp.asarray(problem.residual)
        history = jnp.zeros(M, dtype)
        objectives = [np.sum(np.float64(residual) ** 2)]
        for chunk in np.random.default_rng(1).permutation(M).reshape(-1, chunk_size):
            order = jnp.asarray(chunk)
            atoms, residual = sweep(solver, atoms, residual, problem.codes, history, order)
            objectives.append(np.sum(np.float64(residual) ** 2))
    start = np.sum(np.float64(problem.x) ** 2)  # what a sum of squares is rounded against
    assert (np.diff(objectives) <= 10 * epsilon * (objectives[0] + start)).all()
    assert objectives[-1] < 0.999 * objectives[0]
    np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1, atol=10 * epsilon)
    # x - residual is what some codes on the same support make of the new atoms.
    for row, left, used in zip(problem.x, residual, problem.z != 0, strict=True):
        support = np.float64(atoms)[used].T
        fitted = np.float64(row) - np.float64(left)
        away = fitted - support @ np.linalg.lstsq(support, fitted)[0]
        size = np.linalg.norm(row) + np.abs(problem.z).max() + np.linalg.norm(left)
        assert np.linalg.norm(away) <= 1000 * epsilon * size  # every move of an atom rounds


Sweep = Callable[..., tuple[jax.Array, jax.Array]]


@pytest.mark.parametrize("history", [0.0, 20.0])
@pytest.mark.parametrize("encoder", [OMP, NonNegativeOMP])
@pytest.mark.parametrize("chunk_size", [1, 5, M, M + 3])
def test_both_sweeps_are_the_same(chunk_size: int, encoder: type, history: float) -> None:
    """Also where the chunk size does not divide the number of atoms, or is above it."""
    settings = {"encoder": encoder, "history": history, "chunk_size": chunk_size, "power_steps": 2}
    with jax.enable_x64(True):
        for hard in HARD:
            problem = hard(np.float64)
            if encoder is NonNegativeOMP:
                problem.z = np.abs(problem.z)
            one, two = (problem.update(s, list(range(M)), **settings) for s in SWEEPS.values())
            np.testing.assert_allclose(one[0], two[0], atol=1e-9)
            np.testing.assert_allclose(one[1], two[1], atol=1e-9 * np.abs(problem.x).max())


def test_residual_is_rows_minus_codes_times_atoms(sweep: Sweep) -> None:
    """In a single chunk of atoms that share no row, codes follow in closed form: z_j = E d_j."""
    rng = np.random.default_rng(2)
    problem = random_problem(0)
    problem.z[np.arange(N), rng.integers(0, M, N)] = rng.uniform(1, 2, N)
    atoms, residual = problem.update(sweep, list(range(M)))
    z = np.where(problem.z != 0, problem.x @ atoms.T, 0)
    np.testing.assert_allclose(residual, problem.x - z @ atoms, atol=1e-5)


@pytest.mark.parametrize("atom", [0, 7])
def test_one_atom_and_many_power_steps_give_the_top_singular_pair(sweep: Sweep, atom: int) -> None:
    with jax.enable_x64(True):
        problem = random_problem(0.3, np.float64)
        problem.x += 3 * np.outer(problem.z[:, atom], np.ones(D))  # a gap: 30 power steps suffice
        atoms, residual = problem.update(sweep, [atom], power_steps=30)
    rows = problem.z[:, atom] != 0
    error = problem.residual[rows] + np.outer(problem.z[rows, atom], problem.atoms[atom])
    u, s, vt = np.linalg.svd(error, full_matrices=False)
    assert abs(atoms[atom] @ vt[0]) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(residual[rows], error - s[0] * np.outer(u[:, 0], vt[0]), atol=1e-9)
    np.testing.assert_array_equal(residual[~rows], problem.residual[~rows])
    np.testing.assert_array_equal(np.delete(atoms, atom, 0), np.delete(problem.atoms, atom, 0))


@pytest.mark.parametrize("history", [0.0, 50.0])
def test_one_power_step_is_approximate_ksvd(sweep: Sweep, history: float) -> None:
    """Rubinstein et al. (2008), algorithm 5: d = E^T z / ||E^T z||, then z = E d; here with rows
    from before that the atom fits as it stands, of this energy."""
    with jax.enable_x64(True):
        problem = random_problem(0.3, np.float64)
        atoms, residual = problem.update(sweep, [3], history=history)
    rows = problem.z[:, 3] != 0
    error = problem.residual[rows] + np.outer(problem.z[rows, 3], problem.atoms[3])
    d = error.T @ problem.z[rows, 3] + history * problem.atoms[3]
    d /= np.linalg.norm(d)
    np.testing.assert_allclose(atoms[3], d, atol=1e-12)
    np.testing.assert_allclose(residual[rows], error - np.outer(error @ d, d), atol=1e-12)


def test_atoms_of_a_chunk_see_each_other(sweep: Sweep) -> None:
    """Two atoms that are the same and share all rows: the first takes all that is to be had."""
    with jax.enable_x64(True):
        problem = duplicate_atoms(np.float64)
        together, left = problem.update(sweep, [0, 1])
        first = problem.update(sweep, [0])[0]
    np.testing.assert_allclose(together[0], first[0], atol=1e-12)
    assert np.sum(left**2) < np.sum(problem.residual**2)


def test_coefficients_stay_positive(sweep: Sweep) -> None:
    """Rows that lie opposite to their atoms: the best that is allowed is 0."""
    with jax.enable_x64(True):
        problem = random_problem(0.5, np.float64)
        problem.z = np.abs(problem.z)
        problem.x = problem.x - 2 * problem.z @ problem.atoms
        atoms, residual = problem.update(sweep, list(range(M)), encoder=NonNegativeOMP)
        for row, left, used in zip(problem.x, residual, problem.z != 0, strict=True):
            if used.any():
                z, _ = scipy.optimize.nnls(atoms[used].T, row - left)
                np.testing.assert_allclose(z @ atoms[used], row - left, atol=1e-9)
    assert np.sum(residual**2) < np.sum(problem.residual**2)


def test_unused_atoms_are_left_alone(sweep: Sweep) -> None:
    problem = random_problem(0.3)
    problem.z[:, 4] = 0
    full, residual = problem.update(sweep, [4, 5, 6, 7])
    np.testing.assert_array_equal(full[4], problem.atoms[4])
    without, same = problem.update(sweep, [5, 6, 7])
    np.testing.assert_allclose(without, full, atol=1e-6)
    np.testing.assert_allclose(same, residual, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 5, M, M + 3])
def test_a_step_moves_every_used_atom_once(chunk_size: int) -> None:
    """Also where the chunk size does not divide the number of atoms, or is above it."""
    x = jnp.asarray(random_problem(0.3).x)
    solver = KSVD(M, OMP(k=2), chunk_size=chunk_size)
    state = solver.init(x, n_steps=1, key=KEY)
    codes = OMP(k=2).prepare(solver.result(state)[0]).encode(x)
    after, _ = solver.step(state, Batch(x), key=KEY)
    moved = np.abs(np.asarray(after.atoms - state.atoms)).max(axis=1) > 1e-4
    np.testing.assert_array_equal(moved, (np.asarray(codes.dense()) != 0).any(axis=0))
    assert moved.sum() == M


def test_padding_of_the_last_chunk_changes_nothing() -> None:
    """One chunk that is too long moves all atoms together, like one that fits."""
    x = jnp.asarray(random_problem(0.3).x)
    fits, padded = (KSVD(M, OMP(k=3), chunk_size=size) for size in (M, M + 3))
    state = fits.init(x, n_steps=1, key=KEY)
    one, two = (solver.step(state, Batch(x), key=KEY)[0] for solver in (fits, padded))
    np.testing.assert_allclose(one.atoms, two.atoms, atol=1e-5)


def test_order_of_chunks_follows_the_key() -> None:
    x = jnp.asarray(random_problem(0.3).x)
    solver = KSVD(M, OMP(k=3), chunk_size=2)
    state = solver.init(x, n_steps=1, key=KEY)
    one, two = (solver.step(state, Batch(x), key=jax.random.key(seed))[0] for seed in (1, 2))
    assert not eqx.tree_equal(one.atoms, two.atoms)


def axes(weights: list[float]) -> jax.Array:
    """A row along each axis, of the given length; a length of 0 gives a zero row."""
    return jnp.diag(jnp.asarray(weights, jnp.float32))


def test_dead_atoms_become_the_worst_residuals_and_only_when_due() -> None:
    """Atoms on axes 0 to 3; rows first use all but atom 3, then leave two more axes unexplained."""
    solver = KSVD(4, OMP(k=1), dead_after=12)
    state = solver.init(axes([1, 1, 1, 1, 0, 0])[:4], n_steps=3, key=KEY)
    lost = int(np.argmax(np.abs(state.atoms[:, 3])))
    usual = axes([1, 1, 1, 0, 0, 0])
    after, info = solver.step(state, Batch(usual), key=KEY)
    assert after.rows_since_used[lost] == 6
    np.testing.assert_allclose(after.atoms, state.atoms, atol=1e-6)  # absent once: not reset
    assert info.dead == 0

    # Atoms explain axes 0 to 2; rows on axes 4 (length 3) and 5 (length 2) are left whole.
    after, info = solver.step(after, Batch(axes([1, 1, 1, 0, 3, 2])), key=KEY)
    assert info.dead == 1
    np.testing.assert_allclose(np.abs(after.atoms[lost]), np.eye(6)[4], atol=1e-6)
    assert after.rows_since_used[lost] == 0
    np.testing.assert_array_equal(np.delete(after.atoms, lost, 0), np.delete(state.atoms, lost, 0))


def test_each_dead_atom_takes_another_row_and_none_takes_a_row_without_error() -> None:
    solver = KSVD(4, OMP(k=1), dead_after=3)
    state = solver.init(axes([1, 1, 1, 1, 0, 0])[:4], n_steps=1, key=KEY)
    # Rows on axes 4 and 5 use no atom at all, so that all four are dead, and two can be replaced.
    after, info = solver.step(state, Batch(axes([0, 0, 0, 0, 3, 2])[3:]), key=KEY)
    assert info.dead == 4
    replaced = np.asarray(after.rows_since_used) == 0
    assert replaced.sum() == 2
    np.testing.assert_array_equal(after.atoms[replaced], np.eye(6)[[4, 5]])
    np.testing.assert_array_equal(after.atoms[~replaced], state.atoms[~replaced])
