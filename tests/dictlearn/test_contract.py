"""What every solver and every array-free encoder must keep. A newcomer adds a line to a table."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from activations.config import validate
from dictlearn import artifact, devices, registry
from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.activations import AbsTopK
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.linear import Tied
from dictlearn.encoders.matryoshka_omp import MatryoshkaOMP
from dictlearn.encoders.mp import MP
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.nnls import NNLS
from dictlearn.encoders.omp import OMP
from dictlearn.solvers import sae_variants as variants
from dictlearn.solvers.base import AbstractSolver, Batch, Info
from dictlearn.solvers.ksvd import KSVD
from dictlearn.solvers.sae import SAE
from dictlearn.solvers.snmf import SNMF
from dictlearn.solvers.untrained import Untrained


def named(union: Any) -> dict[str, Any]:
    """The classes that a config may choose from, by name."""
    kinds = typing.get_args(typing.get_args(union)[0])
    return {kind.__dataclass_fields__["name"].default: kind for kind in kinds}


SOLVERS = named(registry.Solver)
VARIANTS = named(typing.get_type_hints(SAE, include_extras=True)["variant"])
ARRAY_FREE = {
    name: kind
    for name, kind in registry.ENCODERS.items()
    if issubclass(kind, AbstractEncoder)
    and not any(
        isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
        for hint in typing.get_type_hints(kind).values()
    )
}


@dataclasses.dataclass(frozen=True)
class Small:
    """How the suite makes a solver.

    Attributes:
      make: (n_atoms, k, dead_after) -> solver.
      steps: what it may take to find planted atoms, in batches of 1024 rows.
      share: of the planted atoms that it must find. K-SVD with exact SVDs does not find all either:
        two atoms that each mix the same two planted ones are a local minimum.
      signed: whether its codes may be negative.
      bounded: whether no row may have more than k codes; else k is a mean, which takes some steps.
      same: whether a step's codes are those of the encoder that it would give.
      vary: whether planted rows differ in their number of atoms: a batch shares out its codes.
      whole: whether every batch is all rows.
    """

    make: Callable[[int, int, int], AbstractSolver[Any]]
    steps: int
    share: float
    signed: bool
    bounded: bool = True
    same: bool = True
    vary: bool = False
    whole: bool = False


SMALL = {
    "ksvd": Small(
        make=lambda m, k, dead_after: KSVD(m, OMP(k=k), chunk_size=4, dead_after=dead_after),
        steps=60,
        share=0.75,
        signed=True,
    ),
    "snmf": Small(
        make=lambda m, k, dead_after: SNMF(m, winners=1.0),
        steps=100,
        share=0.4,
        signed=False,
        bounded=False,
        same=False,
        vary=False,
        whole=True,
    ),
    "untrained": Small(
        make=lambda m, k, dead_after: Untrained(m, OMP(k=k), "data_rows", dead_after=dead_after),
        steps=1,
        share=0.0,
        signed=True,
    ),
}


def sae(variant: Callable[[int], Any], signed: bool = False, **more: Any) -> Small:
    """An autoencoder with a variant, made from k."""
    settings = {key: more.pop(key) for key in ("matryoshka",) if key in more}
    return Small(
        make=lambda m, k, dead_after: SAE(
            m, variant(k), learning_rate=1e-2, aux_k=8, dead_after=dead_after, **settings
        ),
        **{"steps": 1500, "share": 0.9, "signed": signed} | more,
    )


SMALL |= {
    "sae topk": sae(variants.TopK),
    "sae abs_topk": sae(variants.AbsTopK, signed=True),
    "sae batch_topk": sae(variants.BatchTopK, bounded=False, same=False, vary=True),
    "sae batch_topk matryoshka": sae(
        variants.BatchTopK, bounded=False, same=False, vary=True, matryoshka=8, share=0.8
    ),
    "sae relu": sae(variants.ReLU, bounded=False),
    "sae jumprelu": sae(variants.JumpReLU, bounded=False),
    "sae gradient_topk": sae(variants.GradientTopK),
}
ENCODER = {
    "omp": lambda k: OMP(k=k),
    "nn_omp": lambda k: NonNegativeOMP(k=k),
    "nnls": lambda k: NNLS(),
    "mp": lambda k: MP(k=k),
    "matryoshka_omp": lambda k: MatryoshkaOMP(k=k, smallest=M if k == 1 else 12),
    "tied": lambda k: Tied(AbsTopK(k)),
}
KEY = jax.random.key(0)
M, D, K, N = 24, 16, 3, 128


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> Small:
    return SMALL[request.param]


@pytest.fixture
def solver(small: Small) -> AbstractSolver[Any]:
    return small.make(M, K, 100_000)


def planted(
    n: int, m: int, d: int, k: int, *, seed: int, signed: bool = False, vary: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Rows [n d] of k atoms each with weights of 1 to 2 in size, and the unit atoms [m d].

    With `vary`, k is a mean: of 2 k atoms, each has an even chance.
    """
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((m, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    k = 2 * k if vary else k
    support = np.argsort(rng.random((n, m)), axis=1)[:, :k]
    values = rng.uniform(1, 2, (n, k)) * (rng.choice([-1, 1], (n, k)) if signed else 1)
    values *= rng.integers(2, size=(n, k)) if vary else 1
    codes = np.zeros((n, m))
    np.put_along_axis(codes, support, values, axis=1)
    return jnp.asarray(codes @ atoms, jnp.float32), jnp.asarray(atoms, jnp.float32)


def batch_of(solver: AbstractSolver[Any], x: jax.Array) -> Batch:
    """With a gradient that picks the codes that no gradient would."""
    return Batch(x, jnp.zeros_like(x) if "gradient" in solver.needs else None)


def run(
    solver: AbstractSolver[Any], x: jax.Array, *, steps: int, size: int, sample: jax.Array
) -> tuple[Any, list[Info]]:
    """Some steps over consecutive batches of x, from its beginning again where it ends."""
    state = solver.init(sample, n_steps=steps, key=KEY)
    infos = []
    size = len(x) if "all rows" in solver.needs else size
    mesh = devices.mesh()  # test_devices runs this suite with eight
    state = devices.everywhere(state, mesh)

    @functools.cache
    def batch(start: int) -> Batch:
        return batch_of(solver, devices.spread(x[start : start + size], mesh))

    for step in range(steps):
        key = jax.random.fold_in(KEY, step)
        state, info = solver.step(state, batch(step * size % len(x)), key=key)
        infos.append(info)
    return state, infos


def encode(solver: AbstractSolver[Any], state: Any, x: jax.Array) -> tuple[Dictionary, SparseCodes]:
    """What the solver's result makes of normalised rows."""
    dictionary, encoder = solver.result(state)
    return dictionary, encoder.prepare(dictionary).encode(x)


def atoms_of(solver: AbstractSolver[Any], state: Any) -> jax.Array:
    return solver.result(state)[0].atoms


def coder_of(solver: AbstractSolver[Any], state: Any) -> Coder:
    mean = jnp.arange(D, dtype=jnp.float32)
    return Coder(Normaliser(mean, jnp.float32(3.25)), *solver.result(state))


def assert_finite(tree: Any) -> None:
    for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)):
        assert np.isfinite(leaf).all()


def assert_unit(atoms: jax.Array) -> None:
    np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1, atol=1e-5)


def test_tables_name_what_is_registered() -> None:
    assert {name.split()[0] for name in SMALL} == set(SOLVERS)
    assert {name.split()[1] for name in SMALL if name.startswith("sae ")} == set(VARIANTS)
    assert set(ENCODER) == set(ARRAY_FREE)


# Solvers


def test_planted_atoms_are_recovered(small: Small) -> None:
    m, d, size = 64, 48, 1024
    x, atoms = planted(16 * size, m, d, K, seed=1, signed=small.signed, vary=small.vary)
    solver = small.make(m, K, 4 * size)

    def share_found(state: Any) -> float:
        cosine = np.abs(atoms @ atoms_of(solver, state).T).max(axis=1)
        return float((cosine > 0.99).mean())

    assert share_found(solver.init(x, n_steps=1, key=KEY)) < 0.1
    assert share_found(run(solver, x, steps=small.steps, size=size, sample=x)[0]) >= small.share


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_atoms_have_unit_norm(solver: AbstractSolver[Any], scale: float) -> None:
    x = scale * planted(N, M, D, K, seed=2)[0]
    assert_unit(atoms_of(solver, solver.init(x, n_steps=4, key=KEY)))
    assert_unit(atoms_of(solver, run(solver, x, steps=4, size=N, sample=x)[0]))


@pytest.mark.parametrize("name", SMALL)
def test_a_seen_shape_compiles_nothing(name: str, compiled: list[str]) -> None:
    solver = SMALL[name].make(M, K, 100_000)
    size = N + 10 + list(SMALL).index(name)  # that no other test has
    x = planted(3 * size, M, D, K, seed=3)[0]
    batches = [batch_of(solver, rows) for rows in jnp.split(x, 3)]
    keys = list(jax.random.split(KEY, 3))
    state = solver.init(x[:size] if SMALL[name].whole else x, n_steps=3, key=KEY)
    jax.block_until_ready(solver.step(state, batches[0], key=keys[0]))
    assert compiled
    compiled.clear()
    for batch, key in zip(batches[1:], keys[1:], strict=True):
        state, _ = solver.step(state, batch, key=key)
    jax.block_until_ready(state)
    assert not compiled


def test_same_key_and_batches_give_the_same_state(solver: AbstractSolver[Any]) -> None:
    x = planted(4 * N, M, D, K, seed=4)[0]
    one, two = (run(solver, x, steps=4, size=N, sample=x) for _ in range(2))
    assert eqx.tree_equal(one, two)


def test_step_is_pure(solver: AbstractSolver[Any]) -> None:
    x = planted(2, M, D, 1, seed=5)[0]  # few rows, so that a state that only counts changes too
    x = jnp.tile(x, (M, 1))
    state, batch = solver.init(x, n_steps=2, key=KEY), batch_of(solver, x)
    before = jax.tree.map(np.array, (state, batch))
    after, _ = solver.step(state, batch, key=KEY)
    assert eqx.tree_equal(before, jax.tree.map(np.array, (state, batch)))
    assert not eqx.tree_equal(state, after)


def test_hyperparameters_are_the_configuration(solver: AbstractSolver[Any]) -> None:
    table = artifact.hyperparameters(solver)
    assert eqx.tree_equal(validate(registry.Solver, table, "test"), solver)


def test_save_and_load_are_exact(solver: AbstractSolver[Any], tmp_path: Path) -> None:
    x = planted(N, M, D, K, seed=6)[0]
    coder = coder_of(solver, run(solver, x, steps=2, size=N, sample=x)[0])
    artifact.save(tmp_path, coder, {}, {})
    loaded = artifact.load(tmp_path).coder
    assert eqx.tree_equal(loaded, coder)
    assert eqx.tree_equal(loaded.encode(x), coder.encode(x))


HARD = {
    "zero rows": lambda x: x.at[::2].set(0),
    "all rows zero": jnp.zeros_like,
    "duplicate rows": lambda x: jnp.tile(x[: N // 8], (8, 1)),
    "constant batch": lambda x: jnp.tile(x[:1], (N, 1)),
    "rows of rank one": lambda x: x[:, :1] * x[:1],
    "great rows": lambda x: x.at[:2].multiply(1e4),
}


@pytest.mark.parametrize(
    ("hard", "k"), [*((hard, K) for hard in HARD), ("zero rows", 1), ("duplicate rows", M)]
)
def test_stays_finite(small: Small, hard: str, k: int) -> None:
    """Duplicate rows in the sample also make duplicate atoms."""
    x = HARD[hard](planted(N, M, D, K, seed=7)[0])
    solver = small.make(M, k, 2 * N)
    state, infos = run(solver, x, steps=4, size=N, sample=x)
    dictionary, codes = encode(solver, state, x)
    assert_finite((state, codes, [(info.objective, info.l0) for info in infos]))
    assert_unit(dictionary.atoms)
    assert (codes.l0() <= k).all() or not small.bounded
    assert getattr(solver.control, "k", k) == k


@pytest.mark.parametrize("kept", [1.0, 0.0])
@pytest.mark.parametrize("name", [name for name, small in SMALL.items() if small.same])
def test_info_is_of_the_batch_before_the_update(name: str, kept: float) -> None:
    """With signed rows and with zero rows among them."""
    small = SMALL[name]
    x = planted(N, M, D, K, seed=8)[0]
    x = (x - x.mean(axis=0, keepdims=True)).at[: N // 4].multiply(kept)
    solver = small.make(M, K, 100_000)
    state = run(solver, x, steps=2, size=N, sample=x)[0]
    dictionary, codes = encode(solver, state, x)
    _, info = solver.step(state, batch_of(solver, x), key=KEY)
    error = float(((x - dictionary.decode(codes)) ** 2).sum(axis=1).mean())
    variance = float(((x - x.mean(axis=0, keepdims=True)) ** 2).sum(axis=1).mean())
    assert info.objective == pytest.approx(error, rel=1e-4)
    assert info.fvu == pytest.approx(error / variance, rel=1e-4)
    assert info.l0 == pytest.approx(float((codes.dense() != 0).sum(axis=1).mean()), rel=1e-6)
    assert 0 < info.l0 <= (K if small.bounded else M)


@pytest.mark.parametrize("name", [name for name, small in SMALL.items() if small.same])
def test_dead_counts_atoms_unused_for_so_many_rows(name: str) -> None:
    """Atoms of one half of the dimensions, rows of the other."""
    small = SMALL[name]
    x = planted(4 * N, M, D, K, seed=9)[0]
    sample = jnp.where(jnp.arange(len(x))[:, None] % 2 == 0, x, 0).at[:, : D // 2].set(0)
    sample = jnp.where(jnp.arange(len(x))[:, None] % 2 == 1, x.at[:, D // 2 :].set(0), sample)
    x = x.at[:, D // 2 :].set(0)
    solver = small.make(M, 1, 3 * N)
    state = solver.init(sample, n_steps=4, key=KEY)
    used = np.zeros(M, bool)
    for step in range(3):
        codes = encode(solver, state, x[step * N :][:N])[1]
        used |= (np.asarray(codes.dense()) != 0).any(axis=0)
        state, info = solver.step(state, batch_of(solver, x[step * N :][:N]), key=KEY)
        assert info.dead == (np.sum(~used) if step == 2 else 0)
    assert 0 < np.sum(~used) < M


def test_fewer_rows_than_atoms(solver: AbstractSolver[Any]) -> None:
    with pytest.raises(ValueError, match=f"^n_atoms: {M} .* only {M - 1}"):
        solver.init(jnp.ones((M - 1, D)), n_steps=1, key=KEY)
    solver.init(jnp.ones((M, D)), n_steps=1, key=KEY)


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"snmf"}))
def test_more_nonzeros_than_atoms(name: str) -> None:
    small = SMALL[name]
    with pytest.raises(ValueError, match=rf"^(\w+\.)*k: {M + 1} .*n_atoms = {M}"):
        small.make(M, M + 1, 1)


# Array-free encoders


@pytest.fixture(params=ARRAY_FREE)
def make_encoder(request: pytest.FixtureRequest) -> Callable[[int], AbstractEncoder]:
    return ENCODER[request.param]


def awkward_dictionary() -> Dictionary:
    """Atoms of many norms, one of them zero, two the same; and a bias."""
    rng = np.random.default_rng(10)
    atoms = rng.standard_normal((M, D)) * 10 ** rng.uniform(-2, 2, (M, 1))
    atoms[3] = 0
    atoms[5] = atoms[4]
    return Dictionary(
        jnp.asarray(atoms, jnp.float32), jnp.asarray(rng.standard_normal(D), jnp.float32)
    )


@pytest.mark.parametrize("k", [1, 5, M])
def test_codes_on_any_dictionary(make_encoder: Callable[[int], AbstractEncoder], k: int) -> None:
    dictionary = awkward_dictionary()
    x = jnp.asarray(np.random.default_rng(11).standard_normal((N, D)), jnp.float32)
    encoder = make_encoder(k)
    codes = encoder.prepare(dictionary).encode(x)
    indices, values = np.asarray(codes.indices), np.asarray(codes.values)
    assert codes.n_atoms == M
    assert np.isfinite(values).all()
    assert ((indices >= 0) & (indices < M)).all()
    nonzeros = (values != 0).sum(axis=1)
    assert (nonzeros > 0).all()
    assert (nonzeros <= k).all() or isinstance(encoder, NNLS)
    for row, used in zip(indices, values != 0, strict=True):  # no atom twice in a row
        assert len(set(row[used])) == used.sum()
    assert not (indices[values != 0] == 3).any()  # a zero atom explains nothing
    error = ((x - dictionary.decode(codes)) ** 2).sum(axis=1)
    if isinstance(encoder, Tied) and k > 1:
        return  # atoms that overlap are counted twice: that is what is wrong with it
    assert (error < ((x - dictionary.bias[None]) ** 2).sum(axis=1)).all()


def test_a_row_at_the_bias_has_zero_codes(
    make_encoder: Callable[[int], AbstractEncoder],
) -> None:
    dictionary = awkward_dictionary()
    rows = jnp.tile(dictionary.bias[None], (4, 1)).at[1].add(1)
    codes = make_encoder(3).prepare(dictionary).encode(rows)
    np.testing.assert_array_equal(codes.l0() > 0, [False, True, False, False])


def test_encoding_a_seen_shape_compiles_nothing(
    make_encoder: Callable[[int], AbstractEncoder], compiled: list[str]
) -> None:
    one, two = (Dictionary(planted(M, M, D, K, seed=s)[0], jnp.zeros(D)) for s in (12, 13))
    x = jnp.ones((N + 2, D))  # a size that no other test has
    jax.block_until_ready(make_encoder(2).prepare(one).encode(x))
    assert compiled
    compiled.clear()
    jax.block_until_ready(make_encoder(2).prepare(two).encode(x))
    assert not compiled
