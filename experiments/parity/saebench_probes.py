"""Our probing, SCR, TPP and absorption beside SAEBench 0.6.0's and sae-probes 0.4.2's own.

    (the environment of experiments.parity.saebench)
    python -m experiments.parity.saebench_probes RUN FILE --peer .saebench/bin/python

FILE holds labelled texts (evals.texts). SAEBench's pipelines of sparse probing, TPP and SCR run
whole, from texts to scores, and so do ours, with the same rows for each probe. Full probes start
elsewhere and see their batches in another order: their accuracies are compared in percentage
points, as a mean over --seeds. Our TPP and SCR get the probes that SAEBench has trained; their
scores, and pooled rows, effects and ablated rows on the way, are compared as they are. sae-probes'
regressions get the same rows, SAEBench's absorption the same activations and codes. A JSON line
says how far apart a figure is at most, relative to theirs (scores: absolute), or by how many
points.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from activations import models
from activations.terminal import UserError, run_command
from dictlearn.interop import load
from evals import absorption_scores, cache, sae_probes, scr, sparse_probing, tpp
from evals.ablation import THEIRS, Bench, benches
from evals.linear_probe import LinearProbe, balanced
from evals.pooled import Pooled, pool
from evals.sparse_probing import Rowed
from evals.texts import Occupations, TextFile
from experiments.parity.saebench import run_peer

K_VALUES, N_VALUES = (1, 2, 5), (5, 20, 100)
LENGTH = 32


class Given(Bench):
    """A bench whose probes are trained already."""

    def __init__(self, bench: Bench, theirs: Any, family: str, order: Any = slice(None)) -> None:
        self.__dict__ |= bench.__dict__
        weight, bias = (theirs[f"{family}_{name}"][order,] for name in ("weight", "bias"))
        self._probes = iter(
            [LinearProbe(w, float(b), 0) for w, b in zip(weight, bias, strict=True)]
        )

    def train(self, *_: Any, **__: Any) -> LinearProbe:
        """The next one."""
        return next(self._probes)


class Both:
    """One split of texts, measured here; and what the peer needs to measure it there."""

    def __init__(self, path: Path, file: Path, per_class: tuple[int, int]) -> None:
        self.run = load(path)
        told = self.run.metadata
        self.hook, self.spec = told["hook"], told["model"]["spec"]
        self.model = models.load(self.spec)
        sets = (TextFile("file", file),)
        train, test = per_class
        self.cfg = sparse_probing.Config(
            self.hook, sets, max_classes=4, train_per_class=train, test_per_class=test,
            context_length=LENGTH, k_values=K_VALUES,
        )  # fmt: skip
        labelled = sets[0].read()
        classes = labelled.classes[:4]
        groups = [np.flatnonzero(labelled.label == name) for name in classes]
        chosen, _ = labelled.draw(groups, train, test, self.cfg.seed)
        self.texts = [labelled.text[i] for group in chosen for i in group]
        rows = np.arange(len(self.texts)).reshape(len(classes), -1)
        self.own = Rowed("local", classes, list(rows), train, self._pool(self.texts))
        settings: Any = {"context_length": LENGTH, "n_values": N_VALUES}
        self.tpp_cfg = tpp.Config(self.hook, **settings)
        self.scr_cfg = scr.Config(
            self.hook, sets=(Occupations("occupations", 2 * (train + test)),),
            train_per_class=train, test_per_class=test, max_pairs=1, **settings,
        )  # fmt: skip
        self.pair = scr.pairs_of(self.scr_cfg.sets[0].read(), self.scr_cfg)[0]
        self.pair_rows = self._pool(self.pair.text)

    def _pool(self, texts: list[str]) -> Pooled:
        return pool(self.run.coder, cache.read(self.model, self.hook, texts, length=LENGTH))

    def accuracies(self, seed: int) -> dict[str, float]:
        """Of sparse probing, in SAEBench's reading."""
        found = sparse_probing.measure(self.own, self.cfg, seed)
        means = {key: float(np.mean(of)) for key, of in found.items()}
        return {key: means.get(f"{key}{THEIRS}", of) for key, of in means.items()}

    def scores(self, theirs: Any, seed: int) -> dict[str, dict[str, float]]:
        """Of TPP and SCR, in SAEBench's reading, with its probes."""
        numbers, own, pair = list(N_VALUES), self.own, self.pair
        bench = benches(self.run.coder, own.pooled, self.tpp_cfg)[THEIRS]
        found = {"tpp": tpp.perturb(Given(bench, theirs, "tpp"), own.groups, own.n_train, numbers,
                                    seed)}  # fmt: skip
        bench = benches(self.run.coder, self.pair_rows, self.scr_cfg)[THEIRS]
        probes = Given(bench, theirs, "scr", order=(1, 0, 2))  # the second label's comes first
        return found | {"scr": scr.remove(probes, pair.corners, pair.n_train, numbers, seed)}

    def request(self, seed: int) -> dict[str, Any]:
        """The same split for the peer: texts in our order, and the rows of each probe."""
        own, n = self.own, self.own.n_train
        drawn: dict[str, Any] = {}
        for family in ("probing", "tpp"):
            rng = np.random.default_rng(seed)
            shuffled = [rng.permutation(group) for group in own.groups]
            train, test = ([group[of] for group in shuffled] for of in (slice(n), slice(n, None)))
            places = [_places(half) for half in (train, test)]
            table: list[dict[str, Any]] = [{}, {}]
            classes = range(len(own.classes))
            turns = [(c, half) for c in classes for half in (0, 1)]
            if family == "tpp":
                turns = [(c, half) for half in (0, 1) for c in classes]
            for c, half in turns:
                index, y = balanced((train, test)[half], c, rng)
                told = [places[half][i] for i in index], y.astype(int).tolist()
                table[half][own.classes[c]] = told
            drawn[family] = {str(len(places[half])): table[half] for half in (0, 1)}
            self._halves = shuffled
        texts = {
            key: {name: [self.texts[i] for i in group[of]]
                  for name, group in zip(own.classes, self._halves, strict=True)}
            for key, of in (("train", slice(n)), ("test", slice(n, None)))
        }  # fmt: skip
        return {
            "model": str(models.fetch(self.spec)), "hook": self.hook, "seed": seed,
            "dictionary": str(self.run.path.absolute()), "length": LENGTH, "texts": texts,
            "k_values": list(K_VALUES), "n_values": list(N_VALUES), "drawn": drawn,
            "scr": self._pairs(seed),
        }  # fmt: skip

    def _pairs(self, seed: int) -> dict[str, dict[str, list[str]]]:
        """SAEBench's six groups of texts."""
        rng = np.random.default_rng(seed)
        n_train = self.pair.n_train
        split = {
            key: np.split(rng.permutation(of), [n_train * scr.copies(key)])
            for key, of in self.pair.corners.items()
        }
        found = {}
        for place, half in enumerate(("train", "test")):
            n = len(split["+-"][place])
            corner = {key: parts[place][:n] for key, parts in split.items()}
            groups = {
                "male / female": [*corner["++"], *corner["-+"]],
                "female_data_only": [*corner["+-"], *corner["--"]],
                "professor / nurse": [*corner["++"], *corner["+-"]],
                "nurse_data_only": [*corner["-+"], *corner["--"]],
                "male_professor / female_nurse": split["++"][place],
                "female_nurse_data_only": split["--"][place],
            }
            found[half] = {key: [self.pair.text[i] for i in of] for key, of in groups.items()}
        return found

    def rows(self, seed: int) -> dict[str, np.ndarray]:
        """What the peer's functions get as arrays: last tokens, and planted absorption."""
        blocks = cache.read(self.model, self.hook, self.texts, length=LENGTH, keep="last")
        rows = pool(self.run.coder, blocks)
        half = self.own.groups[0], np.concatenate(self.own.groups[1:])[: len(self.own.groups[0])]
        kept = np.random.default_rng(seed).permutation(np.concatenate(half))
        train = np.arange(len(kept) * 3 // 5)
        rng = np.random.default_rng(seed)
        codes = rng.gamma(2, size=(500, 40)) * (rng.random((500, 40)) < 0.2)
        codes *= rng.choice([-1, 1], codes.shape)
        atoms = rng.standard_normal((40, 12))
        atoms[:, 0] += 0.8
        atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
        return {
            "x": rows.x[kept], "codes": rows.codes.toarray().astype(np.float32)[kept],
            "y": np.isin(kept, half[0]), "train": train,
            "test": np.arange(len(train), len(kept)), "absorbed_codes": codes,
            "absorbed_atoms": atoms, "absorbed_main": rng.choice(40, 1 + seed % 3, replace=False),
            "absorbed_x": codes @ atoms + 0.3 * rng.standard_normal((500, 12)),
            "absorbed_probe": 3 * np.eye(12)[0] + 0.1,
        }  # fmt: skip

    def deterministic(
        self, theirs: Any, scores: dict[str, Any], rows: dict[str, np.ndarray], seed: int
    ) -> dict[str, float]:
        """How far what needs no trained probe is apart, relative to theirs."""
        n = self.own.n_train
        train = np.concatenate([group[:n] for group in self._halves])
        bench = benches(self.run.coder, self.own.pooled, self.tpp_cfg)[THEIRS]
        probe = LinearProbe(theirs["tpp_weight"][0].astype(np.float64), 0.0, 0.0)
        rng = np.random.default_rng(seed)
        shuffled = [rng.permutation(group)[:n] for group in self.own.groups]
        effects = bench.effects(probe, balanced(shuffled, 0, rng), "tpp")
        ablated = bench.without(
            theirs["effects"].astype(np.float64), N_VALUES[-1], self._halves[0][n:]
        )
        pooled = self.own.pooled
        found = {
            "pooled activations": _apart(pooled.x[train], theirs["x"]),
            "pooled codes": _apart(pooled.codes.toarray()[train], theirs["codes"]),
            "tpp effects": _apart(effects, theirs["effects"]),
            "ablated rows": _apart(ablated, theirs["ablated"]),
        }
        codes = scipy.sparse.csr_array(rows["absorbed_codes"])
        fraction, full = absorption_scores.absorbed(
            codes, rows["absorbed_atoms"], rows["absorbed_x"], rows["absorbed_probe"],
            rows["absorbed_main"].tolist(), signed=False,
        )  # fmt: skip
        found["absorption fraction"] = _apart(fraction, np.array(scores["absorption"]["fraction"]))
        found["full absorption"] = float((full != scores["absorption"]["full"]).mean())
        last = Pooled(rows["x"], scipy.sparse.csr_array(rows["codes"]), np.ones(len(rows["x"])))
        own = sae_probes.probe(last, rows["y"], rows["train"], rows["test"], K_VALUES, seed)
        for name in ("llm", *(f"sae_top_{k}" for k in K_VALUES)):
            for key, value in zip(
                ("accuracy", "auc", "f1"), scores["sae_probes"][name], strict=True
            ):
                found[f"sae_probes {name}_test_{key}"] = (
                    abs(own[f"{name}_test_{key}"] - value) / value
                )
        return found


def _places(groups: list[np.ndarray]) -> dict[int, int]:
    """Where each row stands when the groups stand one after another."""
    return {int(row): place for place, row in enumerate(np.concatenate(groups))}


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Greatest difference, relative to their greatest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def run(both: Both, peer: str, seeds: range) -> list[dict[str, Any]]:
    """Measure there and here."""
    worst: dict[str, float] = {}
    accuracies: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        request, rows = both.request(seed), both.rows(seed)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "request.json").write_text(json.dumps(request))
            np.savez(folder / "rows.npz", **rows)  # pyright: ignore[reportArgumentType]
            run_peer(peer, "saebench_probes_peer", folder)
            scores = json.loads((folder / "theirs.json").read_text())
            theirs = dict(np.load(folder / "theirs.npz"))
        for key, value in both.deterministic(theirs, scores, rows, seed).items():
            worst[key] = max(worst.get(key, 0.0), value)
        for family, own in both.scores(theirs, seed).items():
            # Theirs has no metric where both directions are biased alike.
            pairs = [
                (value, scores[family][key]) for key, value in own.items() if key in scores[family]
            ]
            key = f"{family} scores, with the same probes"
            worst[key] = max(worst.get(key, 0.0), *(abs(a - b) for a, b in pairs))
        for key, value in both.accuracies(seed).items():
            if key in scores["sparse_probing"]:
                peers = list(scores["sparse_probing"][key].values())
                accuracies.setdefault(key, []).append((value, float(np.mean(peers))))
    lines = [{"figure": key, "apart": value} for key, value in worst.items()]
    for key, values in accuracies.items():
        ours, theirs = np.array(values).T
        apart = 100 * (ours - theirs)
        lines.append({
            "figure": f"sparse_probing {key}", "ours": ours.mean(), "theirs": theirs.mean(),
            "points": apart.mean(), "standard_error": apart.std(ddof=1) / len(apart) ** 0.5,
        })  # fmt: skip
    return lines


def main() -> None:
    """Entry of `python -m experiments.parity.saebench_probes`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.parity.saebench_probes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--peer", required=True, help="the Python of SAEBench's environment")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=200, help="texts a class")
    parser.add_argument("--test", type=int, default=100, help="texts a class")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        raise UserError("--seeds: expected at least 2")
    both = Both(arguments.run, arguments.file, (arguments.train, arguments.test))
    for line in run(both, arguments.peer, range(arguments.seeds)):
        print(json.dumps(line))


if __name__ == "__main__":
    run_command(main)
