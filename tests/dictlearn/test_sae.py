"""The TopK SAE against finite differences and against torch; AuxK; the learning rate."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from dictlearn.dictionary import Dictionary
from dictlearn.solvers.base import Batch
from dictlearn.solvers.sae import SAE, _across, _aux, _rate, _SAEState
from dictlearn.solvers.sae_variants import TopK

KEY = jax.random.key(0)
N, M, D, K, AUX_K = 20, 12, 6, 3, 2
NAMES = ("atoms", "bias", "weight", "encoder bias")


def rows(n: int = N, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, D))


def started(solver: SAE, x: jax.Array, *, n_steps: int, dead: int = 0) -> _SAEState:
    """A state whose biases are not 0 and whose first latents count as dead."""
    state = solver.init(x, n_steps=n_steps, key=KEY)
    rng = np.random.default_rng(1)
    return eqx.tree_at(
        lambda s: (s.parameters.dictionary.bias, s.parameters.bias, s.rows_since_used),
        state,
        (
            jnp.asarray(0.1 * rng.standard_normal(D), x.dtype),
            jnp.asarray(0.1 * rng.standard_normal(M), x.dtype),
            jnp.where(jnp.arange(M) < dead, solver.dead_after, 0).astype(jnp.int32),
        ),
    )


def parameters(state: _SAEState) -> dict[str, np.ndarray]:
    own = state.parameters
    values = (own.dictionary.atoms, own.dictionary.bias, own.weight, own.bias)
    return dict(zip(NAMES, map(np.array, values), strict=True))


def kept(u: np.ndarray, k: int) -> np.ndarray:
    """ReLU(TopK(u)), dense."""
    out = np.zeros_like(u)
    top = np.argsort(-u, axis=1)[:, :k]
    np.put_along_axis(out, top, np.maximum(np.take_along_axis(u, top, axis=1), 0), axis=1)
    return out


def loss(p: dict[str, np.ndarray], x: np.ndarray, dead: int, left: np.ndarray) -> float:
    """The docstring's loss; `left` is what AuxK has to reconstruct, held fixed."""
    u = (x - p["bias"]) @ p["weight"].T + p["encoder bias"]
    error = x - kept(u, K) @ p["atoms"] - p["bias"]
    value = (error**2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    if dead:
        aux = left - kept(u[:, :dead], AUX_K) @ p["atoms"][:dead]
        value += (aux**2).mean() / (left**2).mean() / 32
    return value


@pytest.mark.parametrize("dead", [0, 5])
def test_gradient_is_that_of_finite_differences(dead: int) -> None:
    """Adam's first moment is 0.1 of the gradient, clipped to norm 1, across the atoms."""
    x = rows()
    with jax.enable_x64(True):
        solver = SAE(M, TopK(K), aux_k=AUX_K)
        state = started(solver, jnp.asarray(x), n_steps=10, dead=dead)
        after, _ = solver.step(state, Batch(jnp.asarray(x)), key=KEY)
        mu = optax.tree.get(after.optimiser, "mu")
        ours = parameters(eqx.tree_at(lambda s: s.parameters, after, mu))
        p = parameters(state)
    u = (x - p["bias"]) @ p["weight"].T + p["encoder bias"]
    left = x - kept(u, K) @ p["atoms"] - p["bias"]
    expected = {}
    for name, values in p.items():
        expected[name] = np.zeros_like(values)
        for place in np.ndindex(values.shape):
            there = []
            for step in (1e-6, -1e-6):
                moved = values.copy()
                moved[place] += step
                there.append(loss(p | {name: moved}, x, dead, left))
            expected[name][place] = (there[0] - there[1]) / 2e-6
    along = (expected["atoms"] * p["atoms"]).sum(axis=1, keepdims=True)
    assert np.abs(along).max() > 1e-3
    expected["atoms"] -= along * p["atoms"]
    norm = math.sqrt(sum((g**2).sum() for g in expected.values()))
    for name in NAMES:
        np.testing.assert_allclose(ours[name], 0.1 * expected[name] / max(1, norm), atol=1e-8)


def torch_training(
    p: dict[str, np.ndarray], batches: np.ndarray, solver: SAE
) -> dict[str, np.ndarray]:
    """The same training by torch's autograd and Adam, without AuxK."""
    t = {name: torch.tensor(values, requires_grad=True) for name, values in p.items()}
    adam = torch.optim.Adam(t.values(), betas=(0.9, 0.999), eps=1e-8)
    for step, x in enumerate(torch.tensor(batches), start=1):
        u = (x - t["bias"]) @ t["weight"].T + t["encoder bias"]
        top = torch.topk(u, K, dim=1)
        z = torch.zeros_like(u).scatter(1, top.indices, torch.relu(top.values))
        error = x - z @ t["atoms"] - t["bias"]
        adam.zero_grad()
        ((error**2).sum() / ((x - x.mean(dim=0)) ** 2).sum()).backward()
        with torch.no_grad():
            atoms, gradient = t["atoms"], t["atoms"].grad
            gradient -= (gradient * atoms).sum(dim=1, keepdim=True) * atoms
            norm = torch.sqrt(sum((value.grad**2).sum() for value in t.values()))
            for value in t.values():
                value.grad /= torch.clamp(norm, min=1)
            adam.param_groups[0]["lr"] = rate(solver, step, len(batches))
            adam.step()
            atoms /= atoms.norm(dim=1, keepdim=True)
    return {name: value.detach().numpy() for name, value in t.items()}


def rate(solver: SAE, step: int, n_steps: int) -> float:
    """Linear to the end of the warm-up, then half a cosine that reaches 0 one step too late."""
    warm = solver.warmup * n_steps
    if step < warm:
        return solver.learning_rate * step / warm
    done = max(step - 1 - warm, 0) / (n_steps - warm)
    return solver.learning_rate * min(0.5 * (1 + math.cos(math.pi * done)), step / max(warm, 1))


@pytest.mark.parametrize("scale", [0.3, 1.0, 30.0])
def test_steps_equal_those_of_torch(scale: float) -> None:
    n_steps = 8
    batches = np.stack([scale * rows(seed=seed) for seed in range(n_steps)])
    with jax.enable_x64(True):
        solver = SAE(M, TopK(K), learning_rate=1e-2, warmup=0.3)
        state = started(solver, jnp.asarray(batches[0]), n_steps=n_steps)
        expected = torch_training(parameters(state), batches, solver)
        moved = parameters(state)
        for x in batches:
            state, _ = solver.step(state, Batch(jnp.asarray(x)), key=KEY)
        ours = parameters(state)
    for name in NAMES:
        assert np.abs(ours[name] - moved[name]).max() > 1e-3
        np.testing.assert_allclose(ours[name], expected[name], atol=1e-7)  # the rate is float32
    np.testing.assert_allclose(np.linalg.norm(ours["atoms"], axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
def test_learning_rate(warmup: float) -> None:
    solver, n_steps = SAE(M, TopK(K), learning_rate=3e-3, warmup=warmup), 200
    steps = range(1, n_steps + 1)
    ours = [float(_rate(solver, jnp.array(step), jnp.array(n_steps))) for step in steps]
    np.testing.assert_allclose(ours, [rate(solver, s, n_steps) for s in steps], atol=1e-8)
    assert max(ours) == pytest.approx(3e-3, rel=1e-3)
    assert 0 < ours[-1] < 1e-3 * 3e-3


def test_a_fit_of_one_step_moves() -> None:
    assert float(_rate(SAE(M, TopK(K)), jnp.array(1), jnp.array(1))) == pytest.approx(1e-3)


def test_part_along_the_atoms_is_removed() -> None:
    rng = np.random.default_rng(2)
    atoms = rng.standard_normal((M, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    gradient = rng.standard_normal((M, D))
    across = np.asarray(_across(*(jnp.asarray(a, jnp.float32) for a in (gradient, atoms))))
    np.testing.assert_allclose((across * atoms).sum(axis=1), 0, atol=1e-6)
    rest = gradient - across  # lies along the atoms
    np.testing.assert_allclose(rest, (rest * atoms).sum(axis=1, keepdims=True) * atoms, atol=1e-6)


def test_first_scale_reconstructs_best() -> None:
    """W = a D; no other a leaves a smaller error."""
    x = jnp.asarray(rows(200) + 3, jnp.float32)  # rows that share a direction
    start = Dictionary(x[:M], jnp.zeros(D))
    state = SAE(M, TopK(K)).init(x, n_steps=1, key=KEY, start=start)
    p = parameters(state)
    a = (p["weight"] * p["atoms"]).sum(axis=1)
    np.testing.assert_allclose(p["weight"], a[:, None] * p["atoms"], atol=1e-6)
    np.testing.assert_allclose(a, a[0], rtol=1e-5)

    def error(scale: float) -> float:
        centred = x - p["bias"][None]
        return float(((centred - kept(scale * centred @ p["atoms"].T, K) @ p["atoms"]) ** 2).sum())

    assert error(a[0]) < min(error(0.98 * a[0]), error(1.02 * a[0]))
    assert error(a[0]) < 0.5 * error(1)


def test_codes_are_not_negative_and_negative_ones_are_dropped() -> None:
    x = jnp.asarray(rows(200), jnp.float32)
    solver = SAE(M, TopK(M))
    dictionary, encoder = solver.result(solver.init(x, n_steps=1, key=KEY))
    codes = encoder.prepare(dictionary).encode(x)
    assert (codes.values >= 0).all()
    u = np.asarray((x - dictionary.bias[None]) @ encoder.weight.T)
    np.testing.assert_allclose(codes.dense(), np.maximum(u, 0), atol=1e-5)
    assert (codes.l0() < M).any()


def test_auxk_is_0_while_none_is_dead() -> None:
    x = jnp.asarray(rows(), jnp.float32)
    states = []
    for weight in (0.0, 10.0):
        solver = SAE(M, TopK(K), aux_k=AUX_K, aux_weight=weight, dead_after=50)
        state = started(solver, x, n_steps=10)
        states.append(solver.step(state, Batch(x), key=KEY)[0])
    assert eqx.tree_equal(*states)


def test_auxk_is_the_share_of_the_error_that_dead_latents_leave() -> None:
    """0 where they explain it whole, 1 where they say nothing; the living do not count."""
    solver = SAE(D, TopK(1), aux_k=2)
    error = jnp.abs(jnp.asarray(rows(), jnp.float32)).at[:, 2:].set(0)
    dead, atoms = jnp.arange(D) < 2, jnp.eye(D)
    assert _aux(solver, error, error, dead, atoms) == pytest.approx(0, abs=1e-6)
    assert _aux(solver, error / 2, error, dead, atoms) == pytest.approx(1 / 4, abs=1e-6)
    assert _aux(solver, -error, error, dead, atoms) == pytest.approx(1, abs=1e-6)
    assert _aux(solver, error, error, ~dead, atoms) == pytest.approx(1, abs=1e-6)
    assert np.isfinite(_aux(solver, error, jnp.zeros_like(error), dead, atoms))


def test_auxk_revives_dead_latents() -> None:
    """Half of the latents are too small to be the greatest; but for AuxK no gradient gets there."""
    n, steps = 256, 150
    x = jnp.asarray(rows(n * 4, seed=3), jnp.float32)
    small = jnp.arange(M) < M // 2
    dead = {}
    for weight in (0.0, 1 / 32):
        solver = SAE(M, TopK(1), learning_rate=1e-2, aux_weight=weight, dead_after=n)
        state = solver.init(x, n_steps=steps, key=KEY)
        own = state.parameters
        state = eqx.tree_at(
            lambda s: (s.parameters.weight, s.parameters.bias),
            state,
            (jnp.where(small[:, None], 0.05, 1) * own.weight, jnp.where(small, 0.0, 3.0)),
        )
        for step in range(steps):
            batch = Batch(x[step * n % len(x) :][:n])
            state, info = solver.step(state, batch, key=KEY)
        dead[weight] = int(info.dead)
    assert dead[0.0] == M // 2
    assert dead[1 / 32] <= 2
