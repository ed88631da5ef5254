"""Core: every figure against a plain loop over full forwards, and the ends of its scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from activations import models
from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.activations import AbsTopK, JumpReLU, TopK
from dictlearn.encoders.linear import Linear, Tied
from dictlearn.encoders.omp import OMP
from evals import core
from evals.core import Config
from evals.lm import Behind, CoderModule, Forward

HOOK, D, M, BATCH = "blocks.1.hook_resid_post", 16, 24, 2
CFG = Config(HOOK, tokens=10**6, behaviour_tokens=10**6, batch_size=BATCH)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return models.load(f"dir:{tiny_model_dir}")


@pytest.fixture(scope="module")
def tokens(model: Model) -> np.ndarray:
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 290, (5, 9))
    ids[:, 0] = model.tokenizer.bos_token_id
    ids[3, 5] = model.tokenizer.eos_token_id
    return ids


def sae(activation: Any = None, seed: int = 0) -> Coder:
    """A dictionary of signed or positive codes, off centre and not of unit scale."""
    rng = np.random.default_rng(seed)
    atoms, weight = (rng.standard_normal((M, D)).astype(np.float32) / 4 for _ in range(2))
    small = rng.standard_normal((3, D)).astype(np.float32) / 10
    encoder = Linear(jnp.asarray(weight), jnp.zeros(M), activation or AbsTopK(4))
    return Coder(
        Normaliser(jnp.asarray(small[0]), jnp.asarray(1.5)),
        Dictionary(jnp.asarray(atoms), jnp.asarray(small[1])),
        encoder,
    )


def whole() -> Coder:
    """x_hat = x: as many atoms as dimensions, and OMP takes them all."""
    return Coder(
        Normaliser(jnp.zeros(D), jnp.ones(())), Dictionary(jnp.eye(D), jnp.zeros(D)), OMP(k=D)
    )


def plain(coder: Coder, model: Model, tokens: np.ndarray) -> dict[str, Any]:
    """The definitions, with a full forward for each thing put in."""
    special = np.isin(tokens, model.tokenizer.all_special_ids)
    ids = torch.from_numpy(tokens)
    seen: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        hooks = [(HOOK, lambda x, hook: seen.update(x=x.clone()))]
        with model.bridge.hooks(fwd_hooks=hooks):
            logits = {"without": model.bridge(ids, return_type="logits", use_cache=False)}
        x = seen["x"].numpy()
        x_hat, f = x.copy(), np.zeros((*tokens.shape, M if len(coder.atoms) == M else D))
        codes = coder.encode(x[~special])
        x_hat[~special] = np.asarray(coder.decode(codes))
        f[~special] = np.asarray(codes.dense())
        mean = np.where(special[..., None], x, x[~special].mean(axis=0))
        for name, put in (("sae", x_hat), ("mean", mean), ("ablation", np.zeros_like(x))):
            new = torch.from_numpy(put.astype(np.float32))
            with model.bridge.hooks(fwd_hooks=[(HOOK, lambda seen, hook, new=new: new)]):
                logits[name] = model.bridge(ids, return_type="logits", use_cache=False)
    log_p = {name: value.double().log_softmax(-1).numpy() for name, value in logits.items()}
    kl = {
        name: (np.exp(log_p["without"]) * (log_p["without"] - of)).sum(-1)[~special].mean()
        for name, of in log_p.items()
    }
    nll = {
        name: -np.take_along_axis(of[:, :-1], tokens[:, 1:, None], -1)[..., 0][~special[:, :-1]]
        for name, of in log_p.items()
    }
    return {
        "kl": kl, "ce": {name: values.mean() for name, values in nll.items()},
        "x": x[~special].astype(np.float64), "x_hat": x_hat[~special].astype(np.float64),
        "f": f[~special], "sequence": np.nonzero(~special)[0],
    }  # fmt: skip


@pytest.mark.parametrize("activation", [AbsTopK(4), TopK(5), JumpReLU(jnp.full(M, 0.3))])
def test_figures_against_plain_loops(activation: Any, model: Model, tokens: np.ndarray) -> None:
    coder = sae(activation)
    found = core.run(coder, model, tokens, CFG).metrics
    want = plain(coder, model, tokens)
    near = {"rel": 2e-4, "abs": 1e-6}
    behaviour = found["model_behavior_preservation"]
    assert behaviour["kl_div_with_sae"] == pytest.approx(want["kl"]["sae"], **near)
    assert behaviour["kl_div_with_ablation"] == pytest.approx(want["kl"]["ablation"], **near)
    assert behaviour["kl_div_with_mean_ablation"] == pytest.approx(want["kl"]["mean"], **near)
    ce, performance = want["ce"], found["model_performance_preservation"]
    for key, name in (("without_sae", "without"), ("with_sae", "sae"),
                      ("with_ablation", "ablation"), ("with_mean_ablation", "mean")):  # fmt: skip
        assert performance[f"ce_loss_{key}"] == pytest.approx(ce[name], rel=1e-5)
    score = (ce["ablation"] - ce["sae"]) / (ce["ablation"] - ce["without"])
    assert performance["ce_loss_score"] == pytest.approx(score, rel=1e-2)
    assert found["headline"]["ce_increase"] == pytest.approx(ce["sae"] - ce["without"], abs=1e-6)
    low, high = found["headline"]["kl_interval"]
    assert low < found["headline"]["kl"] < high

    x, x_hat, f = want["x"], want["x_hat"], want["f"]
    error = ((x - x_hat) ** 2).sum(1)
    quality, sparse = found["reconstruction_quality"], found["sparsity"]
    batches = [np.isin(want["sequence"], [at, at + 1]) for at in (0, 2, 4)]
    assert quality["mse"] == pytest.approx((error / D).mean())
    theirs = np.concatenate([error[b] / b.sum() for b in batches])
    assert quality["mse_saebench060"] == pytest.approx(theirs.mean())
    assert quality["explained_variance"] == pytest.approx(
        1 - error.sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-5
    )
    legacy = [1 - error[b] / ((x[b] - x[b].mean(0)) ** 2).sum(1) for b in batches]
    assert quality["explained_variance_legacy"] == pytest.approx(np.concatenate(legacy).mean())
    square = np.mean([(x[b] ** 2).sum(1).mean() for b in batches])
    entry = np.mean([(x[b] ** 2).mean() for b in batches])
    rest = np.mean([error[b].mean() for b in batches])
    bug = 1 - rest / (square - entry**2)
    assert quality["explained_variance_saebench060"] == pytest.approx(bug, rel=1e-5)
    cosine = (x * x_hat).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(x_hat, axis=1)
    assert quality["cossim"] == pytest.approx(cosine.mean())
    ratio = np.linalg.norm(x_hat, axis=1) / np.linalg.norm(x, axis=1)
    assert found["shrinkage"]["l2_ratio"] == pytest.approx(ratio.mean())
    bias = [(x_hat[b] ** 2).sum(1).mean() / (x[b] * x_hat[b]).sum(1).mean() for b in batches]
    assert found["shrinkage"]["relative_reconstruction_bias"] == pytest.approx(np.mean(bias))
    assert sparse["l0"] == pytest.approx((f != 0).sum(1).mean())
    assert sparse["l1"] == pytest.approx(np.abs(f).sum(1).mean(), rel=1e-5)
    assert sparse["l1_saebench060"] == pytest.approx(f.sum(1).mean(), rel=1e-4, abs=1e-6)


def test_features_against_plain_loops(model: Model, tokens: np.ndarray) -> None:
    coder = sae()
    result = core.run(coder, model, tokens, CFG)
    want = plain(coder, model, tokens)
    f, misc = want["f"], result.metrics["misc_metrics"]
    density, positive = (f != 0).mean(0), (f > 0).mean(0)
    assert misc["frac_alive"] == (density > 0).mean()
    assert misc["frac_alive_saebench060"] == (positive > 0).mean()
    assert misc["freq_over_10_percent"] == (density > 0.1).mean()
    share = density[density > 0.1].sum() / density.sum()
    assert misc["normalized_freq_over_10_percent"] == pytest.approx(share)
    atoms, weight = np.asarray(coder.atoms), np.asarray(coder.encoder.weight)  # pyright: ignore
    for index, row in enumerate(result.details):
        prompts = len(set(want["sequence"][f[:, index] != 0]))
        fired = (f[:, index] != 0).sum()
        assert row["index"] == index
        assert row["feature_density"] == pytest.approx(density[index])
        assert row["consistent_activation_heuristic"] == (fired / prompts if prompts else 0)
        cosine = atoms[index] @ atoms.T / np.linalg.norm(atoms, axis=1)
        cosine /= np.linalg.norm(atoms[index])
        greatest = np.delete(cosine, index).max()
        assert row["max_decoder_cosine_sim"] == pytest.approx(greatest, abs=1e-5)
        own = weight[index] @ atoms[index] / np.linalg.norm(weight[index])
        own /= np.linalg.norm(atoms[index])
        assert row["encoder_decoder_cosine_sim"] == pytest.approx(own, abs=1e-5)


def test_a_whole_dictionary_loses_nothing(model: Model, tokens: np.ndarray) -> None:
    result = core.run(whole(), model, tokens, CFG)
    headline = result.metrics["headline"]
    assert headline["kl"] == pytest.approx(0, abs=1e-5)
    assert headline["ce_increase"] == pytest.approx(0, abs=1e-5)
    assert headline["fvu"] == pytest.approx(0, abs=1e-9)
    assert result.metrics["model_performance_preservation"]["ce_loss_score"] == pytest.approx(
        1, abs=1e-3
    )
    assert result.metrics["misc_metrics"]["average_max_encoder_cosine_sim"] is None
    assert "OMP" in result.null["misc_metrics.average_max_encoder_cosine_sim"]


def test_what_does_not_count_is_left_alone(model: Model, tokens: np.ndarray) -> None:
    document = np.full(tokens.shape, -1)
    document[:2, 3:] = 7
    document[2, 3:] = 8
    found = core.run(sae(), model, tokens, CFG, document).metrics
    assert found["token_stats"]["total_tokens_eval_sparsity_variance"] == 18
    with pytest.raises(UserError, match="no token counts"):
        core.run(sae(), model, tokens, CFG, np.full(tokens.shape, -1))


def test_other_hooks_put_in_as_well(model: Model, tokens: np.ndarray) -> None:
    hook = "blocks.1.mlp.hook_post"
    forward = Forward(model, hook)
    assert not forward.residual
    x = forward.read(tokens)
    with torch.inference_mode():
        want = model.bridge(torch.from_numpy(tokens), return_type="logits", use_cache=False)
    torch.testing.assert_close(forward.logits(tokens, x), want)
    assert (forward.logits(tokens, 0 * x) - want).abs().max() > 1e-3
    assert forward.normed(x[0]) is None


def test_a_dictionary_of_another_width(model: Model, tokens: np.ndarray) -> None:
    narrow = eqx.tree_at(
        lambda c: (c.dictionary, c.normaliser),
        whole(),
        (Dictionary(jnp.eye(8), jnp.zeros(8)), Normaliser(jnp.zeros(8), jnp.ones(()))),
    )
    with pytest.raises(UserError, match=r"8 entries, but blocks\.1\.hook_resid_post .* 16"):
        core.run(narrow, model, tokens, CFG)
    with pytest.raises(UserError, match=r"blocks\.9"):
        core.run(whole(), model, tokens, Config("blocks.9.hook_resid_post"))


# The Coder as a torch module


@pytest.mark.parametrize("activation", [AbsTopK(4), TopK(5), JumpReLU(jnp.full(M, 0.3))])
def test_a_module_does_what_the_coder_does_with_gradients(activation: Any) -> None:
    coder = sae(activation)
    module = CoderModule(coder)
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    codes = module.encode(x)
    rows = x.detach().numpy().reshape(-1, D)
    want = coder.encode(rows)
    np.testing.assert_array_equal(codes.detach().numpy().reshape(-1, M), want.dense())
    x_hat = module(x)
    np.testing.assert_allclose(
        x_hat.detach().numpy().reshape(-1, D), coder.decode(want), rtol=1e-4, atol=1e-5
    )
    (x_hat**2).sum().backward()
    assert x.grad is not None
    step = 1e-3 * np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)

    def loss(sign: float) -> float:
        moved = x.detach() + sign * torch.from_numpy(step)
        kept = (module.encode(moved) != 0) == (codes != 0)
        assert kept.all()  # the same support: else the slope is not that of a smooth function
        return float((module(moved) ** 2).double().sum().detach())

    slope = (loss(1) - loss(-1)) / 2
    assert float((x.grad * torch.from_numpy(step)).sum().detach()) == pytest.approx(slope, rel=2e-2)


def test_a_pursuit_has_no_gradient_but_its_decoder_has() -> None:
    module = CoderModule(whole())
    x = torch.ones(2, D, requires_grad=True)
    codes = module.encode(x).detach().requires_grad_()
    module.decode(codes).sum().backward()
    assert codes.grad is not None
    with pytest.raises(RuntimeError, match="omp have no gradient"):
        module(x).sum().backward()
    tied = CoderModule(eqx.tree_at(lambda c: c.encoder, sae(), Tied(AbsTopK(k=2))))
    tied(x).sum().backward()
    assert x.grad is not None


def test_metrics_are_json(model: Model, tokens: np.ndarray) -> None:
    envelope = core.run(sae(), model, tokens, CFG).envelope({"id": "x"})
    assert set(json.loads(json.dumps(envelope))) >= {"eval_type_id", "eval_result_metrics"}


def test_blocks_in_front_of_the_hook_do_not_run(model: Model, tokens: np.ndarray) -> None:
    calls = []
    handles = [
        block.original_component.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(model.bridge.blocks)
    ]
    forward = Forward(model, HOOK)
    x = forward.read(tokens)
    want = model.bridge(torch.from_numpy(tokens), return_type="logits", use_cache=False)
    calls.clear()
    found = forward.logits(tokens, x)
    for handle in handles:
        handle.remove()
    assert calls == [2]
    torch.testing.assert_close(found, want.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(forward.logits(tokens, x, last=True), found[:, -1:])
    again = model.bridge(torch.from_numpy(tokens), return_type="logits", use_cache=False)
    assert torch.equal(again, want)  # all blocks run again


def test_a_model_that_does_not_bear_it_runs_all_blocks(model: Model, tokens: np.ndarray) -> None:
    def fussy(module: Any, inputs: Any, output: Any) -> None:
        del inputs, output
        if "forward" in vars(module):
            raise ValueError("this block wants to run")

    x = torch.from_numpy(Forward(model, HOOK).read(tokens))
    with torch.inference_mode():
        want = Behind(model.bridge, 2)(x)
        handle = model.bridge.blocks[0].original_component.register_forward_hook(fussy)
        found = Behind(model.bridge, 2)(x)
        handle.remove()
    assert torch.equal(found, want)
