"""Half of experiments.parity.saebench_probes: SAEBench's and sae-probes' own code.

    python -m experiments.parity.saebench_probes_peer FOLDER

FOLDER/request.json and FOLDER/rows.npz say what is to be done; the answers go to FOLDER/theirs.json
and FOLDER/theirs.npz. The pipelines of sparse probing, TPP and SCR run whole, from texts to scores,
each class against the rows that we drew; what they return on the way is kept.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import sae_bench.evals.scr_and_tpp.main as scr_and_tpp  # pyright: ignore[reportMissingImports]
import sae_bench.evals.sparse_probing.main as sparse_probing  # pyright: ignore
import torch
from sae_bench.evals.absorption.feature_absorption_calculator import (  # pyright: ignore
    FeatureAbsorptionCalculator,
)
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig  # pyright: ignore
from sae_bench.evals.sparse_probing import probe_training  # pyright: ignore
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig  # pyright: ignore
from sae_bench.sae_bench_utils import activation_collection, dataset_info  # pyright: ignore
from sae_probes.run_sae_evals import (  # pyright: ignore[reportMissingImports]
    get_sorted_indices,
    mean_act_normalization,
)
from sae_probes.utils_training import find_best_reg  # pyright: ignore[reportMissingImports]
from transformer_lens import HookedTransformer  # pyright: ignore[reportAttributeAccessIssue]
from transformer_lens.model_bridge import TransformerBridge

from experiments.parity.saebench_adapter import CoderSAE

NAME = "local"


class Model(HookedTransformer):
    """A TransformerBridge where SAEBench asks for a HookedTransformer."""

    def __init__(self, bridge: Any) -> None:
        torch.nn.Module.__init__(self)
        object.__setattr__(self, "_bridge", bridge)
        self.tokenizer = bridge.tokenizer
        self.tokenizer.padding_side = "right"  # as a HookedTransformer has it

    def run_with_hooks(self, *tokens: Any, **options: Any) -> Any:
        """The bridge's."""
        return self._bridge.run_with_hooks(*tokens, **options)


class Rows:
    """Gives SAEBench the rows of each class and half that we drew, in place of its own draw."""

    def __init__(self, drawn: dict[str, Any]) -> None:
        self._drawn = drawn

    def __call__(
        self, activations: dict[str, torch.Tensor], name: str, perform_scr: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and labels; the half is known by its size."""
        every = torch.cat(list(activations.values()))
        index, label = self._drawn[str(len(every))][name]
        return every[torch.tensor(index)], torch.tensor(label, dtype=torch.int)


def pipelines(request: dict[str, Any], sae: Any, model: Any) -> tuple[dict, dict]:
    """Scores of one split, and what deterministic functions gave on the way."""
    texts, scores, kept = request["texts"], {}, {}
    utils = sparse_probing.dataset_utils
    utils.get_multi_label_train_test_data = lambda *_: (texts["train"], texts["test"])
    classes = list(texts["train"])
    dataset_info.chosen_classes_per_dataset[NAME] = classes
    scr_and_tpp.COLUMN2_VALS_LOOKUP[NAME] = ("a", "b")
    torch.manual_seed(request["seed"])
    sizes = {"context_length": request["length"], "llm_batch_size": 32, "sae_batch_size": 64}
    common = (model, sae.cfg.hook_layer, sae.cfg.hook_name, "cpu")
    original = probe_training.prepare_probe_data

    probe_training.prepare_probe_data = Rows(request["drawn"]["probing"])
    with tempfile.TemporaryDirectory() as folder:
        config = SparseProbingEvalConfig(k_values=request["k_values"], **sizes)
        _, scores["sparse_probing"] = sparse_probing.run_eval_single_dataset(
            NAME, config, sae, *common, folder, True
        )
        acts = torch.load(Path(folder) / f"{NAME}_activations.pt")
    kept["x"] = torch.cat(
        list(activation_collection.create_meaned_model_activations(acts["train"]).values())
    )
    kept["codes"] = torch.cat(
        list(activation_collection.get_sae_meaned_activations(acts["train"], sae, 64).values())
    )

    probe_training.prepare_probe_data = Rows(request["drawn"]["tpp"])
    settings = {"n_values": request["n_values"], **sizes}
    scr_and_tpp.dataset_creation.get_train_test_data = lambda *_: (texts["train"], texts["test"])
    config = ScrAndTppEvalConfig(perform_scr=False, **settings)
    effects_of = scr_and_tpp.get_all_node_effects_for_one_sae

    def keep(sae: Any, own: dict[str, Any], names: list[str], *rest: Any) -> Any:
        family = "scr" if "male / female" in names else "tpp"
        layers = [own[name].net for name in names]
        kept[f"{family}_weight"] = torch.cat([layer.weight.detach() for layer in layers])
        kept[f"{family}_bias"] = torch.cat([layer.bias.detach() for layer in layers])
        kept[f"{family}_effects"] = effects_of(sae, own, names, *rest)
        return kept[f"{family}_effects"]

    scr_and_tpp.get_all_node_effects_for_one_sae = keep
    with tempfile.TemporaryDirectory() as folder:
        found = scr_and_tpp.run_eval_single_dataset(NAME, config, sae, *common, folder, False)
    scores["tpp"] = scr_and_tpp.create_tpp_plotting_dict(*found)[0]
    first, n = classes[0], request["n_values"][-1]
    kept["effects"] = kept.pop("tpp_effects")[first]
    with torch.no_grad():
        chosen = scr_and_tpp.select_top_n_features(kept["effects"], n, first)
        kept["ablated"] = scr_and_tpp.ablated_precomputed_activations(
            acts["test"][first], sae, chosen, 64
        )

    probe_training.prepare_probe_data = original
    pair = request["scr"]
    scr_and_tpp.dataset_creation.get_train_test_data = lambda *_: (pair["train"], pair["test"])
    config = ScrAndTppEvalConfig(perform_scr=True, **settings)
    with tempfile.TemporaryDirectory() as folder:
        found = scr_and_tpp.run_eval_single_dataset(
            NAME, config, sae, *common, folder, False, ("a", "b")
        )
    scores["scr"] = scr_and_tpp.get_scr_plotting_dict(*found)
    del kept["scr_effects"]
    return scores, {key: value.detach().numpy() for key, value in kept.items()}


def last_token(rows: Any, ks: list[int], seed: int) -> dict[str, Any]:
    """sae-probes' choice of latents and its regressions, on given rows."""
    y, train, test = rows["y"].astype(int), rows["train"], rows["test"]
    codes = torch.from_numpy(rows["codes"])
    order = get_sorted_indices(codes[train], y[train], mean_act_normalization)
    found: dict[str, Any] = {"order": order.tolist()}
    inputs = {f"sae_top_{k}": (codes[:, order[:k]].numpy(), "l1") for k in ks}
    for name, (x, penalty) in ({"llm": (rows["x"], "l2")} | inputs).items():
        told = find_best_reg(x[train], y[train], x[test], y[test], penalty=penalty, seed=seed)
        own = told.metrics
        found[name] = [own.test_acc, own.test_auc, own.test_f1]
    return found


def absorption(rows: Any) -> dict[str, Any]:
    """SAEBench's absorption of given words: its calculator, with a model and a dictionary that
    return given rows."""
    x, codes = (torch.from_numpy(rows[key]).float() for key in ("absorbed_x", "absorbed_codes"))
    at = {"model": 0, "sae": 0}

    def following(key: str, of: torch.Tensor, count: int) -> torch.Tensor:
        at[key] += count
        return of[at[key] - count : at[key]]

    model = types.SimpleNamespace(
        run_with_cache=lambda prompts, names_filter: (
            None, {names_filter[0]: following("model", x, len(prompts))[:, None]},
        ),
        to_tokens=lambda prompts: [[0]],
    )  # fmt: skip
    sae = types.SimpleNamespace(
        device="cpu", W_dec=torch.from_numpy(rows["absorbed_atoms"]).float(),
        encode=lambda a: following("sae", codes, len(a)),
    )  # fmt: skip
    words = [f"w{'abcdefghij'[i % 10]}" for i in range(len(x))]
    calculator = FeatureAbsorptionCalculator(
        model=model, icl_word_list=["zebra", "zinc", "zoo", "zone"], max_icl_examples=3,
        word_token_pos=-1,
    )  # fmt: skip
    found = calculator.calculate_absorption(
        sae, words, torch.from_numpy(rows["absorbed_probe"]).float(),
        rows["absorbed_main"].tolist(), 0, show_progress=False,
    ).word_results  # fmt: skip
    return {
        "fraction": [float(one.absorption_fraction) for one in found],
        "full": [bool(one.is_full_absorption) for one in found],
    }


def main() -> None:
    """Answer the request."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    rows = np.load(folder / "rows.npz")
    bridge = TransformerBridge.boot_transformers(request["model"], device="cpu")
    sae = CoderSAE(request["dictionary"], model_name=NAME, hook=request["hook"])
    scores, kept = pipelines(request, sae, Model(bridge))
    scores["sae_probes"] = last_token(rows, request["k_values"], request["seed"])
    scores["absorption"] = absorption(rows)
    (folder / "theirs.json").write_text(json.dumps(scores, default=float))
    np.savez(folder / "theirs.npz", **kept)


if __name__ == "__main__":
    main()
