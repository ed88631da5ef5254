"""Laws of the hooks: what they see is the model's own, and so are the gradients there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from activations import models
from activations.hooks import HookReader
from activations.sequences import targets
from activations.terminal import UserError

FAMILIES = ("gpt2", "pythia", "llama", "gemma3")
D, MLP, LAYERS, VOCABULARY = 16, 48, 3, 60
Command = Callable[..., tuple[int, str, str]]


def original(family: str) -> Any:
    """A random model of a family, as Hugging Face has it, with weights large enough to matter."""
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    usual = common | {
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": MLP,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    grouped = usual | {"num_key_value_heads": 1, "head_dim": 8}
    gpt2 = {"n_embd": D, "n_layer": LAYERS, "n_head": 2, "n_inner": MLP, "n_positions": 64}
    windows = ["sliding_attention", "full_attention", "sliding_attention"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match family:
            case "gpt2":
                config = transformers.GPT2Config(**common, **gpt2, initializer_range=0.2)
                return transformers.GPT2LMHeadModel(config).eval()
            case "pythia":
                return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**usual)).eval()
            case "llama":
                return transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped)).eval()
            case _:
                config = transformers.Gemma3TextConfig(
                    **grouped, sliding_window=3, layer_types=windows
                )
                return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def bridges(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each family's bridge, loaded from a directory as users do."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    loaded = {}
    for name in FAMILIES:
        directory = tmp_path_factory.mktemp("models") / name
        original(name).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        loaded[name] = models.load(f"dir:{directory}").bridge
    return loaded


@pytest.fixture(scope="module")
def bridge(bridges: dict[str, Any], family: str) -> Any:
    return bridges[family]


def tokens(rows: int = 2, columns: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, (rows, columns)).astype(np.int32)


def at(layer: int, *names: str) -> tuple[str, ...]:
    return tuple(f"blocks.{layer}.{name}" for name in names)


def canonical(family: str, layer: int) -> dict[str, int]:
    """The hooks of the table in experiments/docs/pages/harvesting.md, and their widths."""
    names = dict.fromkeys(("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"), D)
    names |= {"attn.hook_z": D, "mlp.hook_post": MLP}
    if family != "pythia":
        names["hook_resid_mid"] = D
    return {f"blocks.{layer}.{name}": width for name, width in names.items()}


def parts(model: Any, family: str) -> tuple[Any, str, str, str]:
    """The layers, and in each the names of attention's output, the MLP's output, what follows."""
    match family:
        case "gpt2":
            return model.transformer.h, "attn.c_proj", "mlp.c_proj", "mlp"
        case "pythia":
            return model.gpt_neox.layers, "attention.dense", "mlp.dense_4h_to_h", "mlp"
        case _:
            return model.model.layers, "self_attn.o_proj", "mlp.down_proj", "mlp"


def test_the_hooks_of_the_table_have_one_vector_a_token(bridge: Any, family: str) -> None:
    wanted = canonical(family, 1)
    reader = HookReader(bridge, wanted)
    assert reader.widths == wanted
    assert reader.stop_at_layer == 2
    assert {name: x.shape for name, x in reader.read(tokens()).items()} == {
        name: (2, 9, width) for name, width in wanted.items()
    }
    if family == "pythia":
        with pytest.raises(UserError, match="no hook"):
            HookReader(bridge, at(1, "hook_resid_mid"))


def test_what_they_see_is_what_hugging_face_computes(bridge: Any, family: str) -> None:
    model, token = original(family), tokens()
    layers, attention, projection, _ = parts(model, family)
    seen: dict[str, torch.Tensor] = {}

    def before(name: str) -> Callable[..., None]:
        return lambda module, args: seen.update({name: args[0]})

    layers[1].get_submodule(attention).register_forward_pre_hook(before("attn.hook_z"))
    layers[1].get_submodule(projection).register_forward_pre_hook(before("mlp.hook_post"))
    with torch.inference_mode():
        states = model(torch.from_numpy(token).long(), output_hidden_states=True).hidden_states
    seen |= {"hook_resid_pre": states[1], "hook_resid_post": states[2]}
    read = HookReader(bridge, canonical(family, 1)).read(token)
    for name, x in seen.items():
        np.testing.assert_allclose(read[f"blocks.1.{name}"], x.numpy(), rtol=1e-4, atol=1e-5)
    residual = read["blocks.1.hook_resid_pre"] + read["blocks.1.hook_attn_out"]
    if family != "pythia":
        np.testing.assert_allclose(read["blocks.1.hook_resid_mid"], residual, rtol=1e-4, atol=1e-4)
    whole = residual + read["blocks.1.hook_mlp_out"]
    np.testing.assert_allclose(read["blocks.1.hook_resid_post"], whole, rtol=1e-4, atol=1e-4)


def test_several_hooks_in_one_pass_see_what_each_sees_alone(bridge: Any, family: str) -> None:
    names = [*canonical(family, 0), "hook_embed", *canonical(family, 2)]
    together = HookReader(bridge, names).read(tokens())
    for name in names:
        np.testing.assert_array_equal(
            together[name], HookReader(bridge, (name,)).read(tokens())[name]
        )


@pytest.mark.parametrize(
    ("hooks", "runs"),
    [
        (("hook_embed",), [1, 0, 0]),
        (("blocks.0.hook_resid_pre",), [1, 0, 0]),
        (("blocks.0.hook_resid_post", "hook_embed"), [1, 0, 0]),
        (("blocks.1.attn.hook_out", "blocks.0.hook_resid_post"), [1, 1, 0]),
        (("blocks.2.hook_resid_post",), [1, 1, 1]),
        (("blocks.0.hook_resid_post", "unembed.hook_out"), [1, 1, 1]),
    ],
)
def test_layers_after_the_deepest_hook_never_run(
    bridges: dict[str, Any], hooks: tuple[str, ...], runs: list[int]
) -> None:
    bridge = bridges["llama"]
    reader = HookReader(bridge, hooks)
    counts, handles = [0, 0, 0], []
    for layer, block in enumerate(bridge.blocks):

        def count(*_: object, layer: int = layer) -> None:
            counts[layer] += 1

        handles.append(block.mlp.register_forward_pre_hook(count))
    assert set(reader.read(np.ones((2, 5), np.int32))) == set(hooks)
    for handle in handles:
        handle.remove()
    assert counts == runs


def test_what_comes_after_changes_nothing_before(bridge: Any, family: str) -> None:
    """Padding on the right: causal attention cannot see it."""
    reader = HookReader(bridge, canonical(family, 2))
    one, other = tokens(), tokens()
    other[:, 6:] = 0
    for name, x in reader.read(one).items():
        np.testing.assert_allclose(x[:, :6], reader.read(other)[name][:, :6], rtol=1e-5, atol=1e-5)


def test_documents_are_kept_apart_where_positions_begin_again(bridge: Any, family: str) -> None:
    reader = HookReader(bridge, canonical(family, 2))
    reader.check_documents()
    token, position = tokens(columns=10), np.tile([0, 1, 2, 0, 0, 1, 2, 3, 4, 5], (2, 1))
    packed, across = reader.read(token, position), reader.read(token)
    for part in (slice(0, 3), slice(3, 4), slice(4, 10)):
        for name, x in reader.read(token[:, part]).items():
            np.testing.assert_allclose(packed[name][:, part], x, rtol=1e-4, atol=1e-4)
    name = "blocks.2.hook_resid_post"
    assert not np.allclose(across[name][:, 4:], packed[name][:, 4:], rtol=1e-2, atol=1e-2)


def test_a_model_that_sees_across_is_found_out(bridges: dict[str, Any]) -> None:
    reader = HookReader(bridges["llama"], ("blocks.2.hook_resid_post",))
    reader._positions = lambda position: {}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="cannot be cut between documents"):
        reader.check_documents()


# Gradients


def loss(logits: torch.Tensor, token: np.ndarray, target: np.ndarray) -> torch.Tensor:
    """Sum of -log p of the targets."""
    log_p = logits.log_softmax(-1)
    terms = [
        log_p[row, column - 1, int(token[row, column])]
        for row, column in zip(*np.nonzero(target), strict=True)
    ]
    return -torch.stack(terms).sum()


DOCUMENT = np.array([[~0, 0, 0, 0, ~1, 1, 1, ~1, 1], [~1, 1, 1, 1, 1, 1, ~2, 2, 2]], np.int32)


def test_gradients_are_those_of_autograd_on_the_original(bridge: Any, family: str) -> None:
    model, token, target = original(family), tokens(), targets(DOCUMENT)
    out = model(torch.from_numpy(token).long(), output_hidden_states=True)
    wanted = torch.autograd.grad(loss(out.logits, token, target), out.hidden_states[1:3])
    names = at(0, "hook_resid_post") + at(1, "hook_resid_pre", "hook_resid_post")
    seen, gradients = HookReader(bridge, names).read_gradients(token, target)
    for name, state, gradient in zip(
        names,
        [out.hidden_states[index] for index in (1, 1, 2)],
        [wanted[index] for index in (0, 0, 1)],
        strict=True,
    ):
        np.testing.assert_allclose(seen[name], state.detach().numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gradients[name], gradient.numpy(), rtol=1e-3, atol=1e-4)
    for name, x in HookReader(bridge, names).read(token).items():
        np.testing.assert_allclose(seen[name], x, rtol=1e-5, atol=1e-5)


STEP = 3e-4  # the norms of Llama and Gemma work in float32, also in a model of float64


def test_gradients_are_those_of_finite_differences(
    family: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """In float64, along random directions: what is added at the hook moves the loss so much.

    `hook_resid_mid` is moved by way of `hook_attn_out`, which is added to it.
    """
    original(family).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    bridge = models.load(f"dir:{tmp_path}").bridge
    bridge.original_model.double()
    moved = {name: name for name in canonical(family, 1)}
    moved |= {name: name.replace("resid_mid", "attn_out") for name in moved if "mid" in name}
    token, target = tokens(), targets(DOCUMENT)
    reader = HookReader(bridge, moved)
    _, gradients = reader.read_gradients(token, target)
    random = np.random.default_rng(0)
    for name, place in moved.items():
        direction = random.standard_normal(gradients[name].shape)
        slope = float((direction * gradients[name]).sum())
        sides = []
        for step in (STEP, -STEP):

            def add(
                x: torch.Tensor, hook: object, change: np.ndarray = step * direction
            ) -> torch.Tensor:
                return x + torch.from_numpy(change).reshape(x.shape)

            with torch.no_grad(), bridge.hooks(fwd_hooks=[(place, add)]):
                logits = bridge(torch.from_numpy(token).long(), use_cache=False)
            sides.append(float(loss(logits, token, target)))
        assert slope == pytest.approx((sides[0] - sides[1]) / (2 * STEP), rel=2e-3, abs=2e-3), name


def test_only_targets_count(bridges: dict[str, Any]) -> None:
    reader = HookReader(bridges["llama"], at(1, "hook_resid_post"))
    token, target = tokens(), np.zeros((2, 9), bool)
    target[0, 5] = target[0, 0] = target[1, 0] = True  # the first of a sequence is never predicted
    (gradient,) = reader.read_gradients(token, target)[1].values()
    assert np.abs(gradient[0, :5]).max(axis=1).min() > 0
    assert not gradient[0, 5:].any()
    assert not gradient[1].any()


def test_gradients_leave_the_model_as_it_was(bridges: dict[str, Any]) -> None:
    bridge = bridges["gemma3"]
    before = [parameter.detach().clone() for parameter in bridge.parameters()]
    reader = HookReader(bridge, at(1, "hook_resid_post"))
    seen = reader.read(tokens())
    reader.read_gradients(tokens(), targets(DOCUMENT))
    assert all(parameter.grad is None for parameter in bridge.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, bridge.parameters(), strict=True))
    for name, x in reader.read(tokens()).items():
        np.testing.assert_array_equal(x, seen[name])


# The command


def test_the_command_lists_hooks_with_their_shapes(
    tiny_model_dir: Path, run_command: Command
) -> None:
    code, out, err = run_command("activations.hooks", f"dir:{tiny_model_dir}", COLUMNS="120")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "(batch, token, 16)" in lines["blocks.N.hook_resid_post"]
    assert lines["blocks.N.hook_resid_post"].split()[-1] == "16"
    assert lines["blocks.N.mlp.hook_post"].split()[-1] == "32"
    assert "(batch, token, 2, 8)" in lines["blocks.N.attn.hook_z"]
    assert lines["blocks.N.attn.hook_z"].split()[-1] == "16"
    assert lines["blocks.N.attn.hook_pattern"].split()[-1] == "-"
    assert "N is 0 to 2" in out
    code, out, err = run_command("activations.hooks", "dir:absent")
    assert (code, out) == (2, "")
    assert err == "error: model dir:absent: no such directory\n"
