"""A run as a SAELens directory:  python -m dictlearn.interop.export RUN DIR [--omp].

    z = activation(x W_enc + b_enc),    x_hat = z W_dec + b_dec

with x raw activations: mean, scale and bias are folded into the weights, in float64, since
SAELens's load_from_disk normalises nothing. With x' = (x - mean) / s, atoms D and bias b,

    W_dec = s D,    b_dec = mean + s b,    W_enc = W^T / s,    b_enc = c - (mean / s + b) W^T.

    linear, by its activation    topk, abstopk, standard (ReLU), jumprelu (BatchTopK too), gated;
                                 gradient_topk as topk, which it is without a gradient
    tied                         topk or abstopk over atoms of unit norm
    omp, mp, matryoshka_omp      matching_pursuit with W_dec = [U; -U], U atoms of unit norm, and k
                                 rounds: SAELens has no signed pursuit, and no OMP
    nn_omp                       matching_pursuit with W_dec = U
    mp_sae                       matching_pursuit, as it was read

Matching pursuit is not OMP: its codes explain less, and keep the figures of the run for no pursuit
above. `--omp` writes architecture "omp" instead, for an OMP run, and beside it the plugin omp.py,
which SAELens needs to read that:

    import runpy; runpy.run_path("DIR/omp.py")
    sae = sae_lens.SAE.load_from_disk("DIR")

Codes of matching_pursuit and omp are lengths of raw activations. Source of the format: sae_lens
6.54.12, saes/*.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from activations.files import building
from activations.terminal import UserError, run_command
from dictlearn.artifact import Run
from dictlearn.dictionary import Coder
from dictlearn.encoders.activations import (
    AbsTopK,
    AbstractActivation,
    Gated,
    GradientTopK,
    JumpReLU,
    ReLU,
    TopK,
)
from dictlearn.encoders.linear import Linear, Tied
from dictlearn.encoders.matryoshka_omp import MatryoshkaOMP
from dictlearn.encoders.mp import MP
from dictlearn.encoders.mp_sae import MPSAE
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.omp import OMP
from dictlearn.interop import load

# Whose format it is: without a version, SAELens takes a config for one from before 6.
VERSION = "6.54.12"
PLUGIN = Path(__file__).with_name("saelens_omp.py")


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """What a SAELens directory holds.

    Attributes:
      config: of cfg.json, without widths and metadata.
      tensors: float64 here, float32 in the file.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def export(run: Run, directory: Path, *, omp: bool = False) -> None:
    """Write a run to a directory that SAELens loads.

    Arguments:
      omp: as architecture "omp", with its plugin.

    Raises:
      UserError: the directory is there; SAELens has nothing that gives these codes.
    """
    if directory.exists():
        raise UserError(f"{directory}: is there already; name another place")
    made = convert(run.coder, omp=omp)
    d_sae, d_in = made.tensors["W_dec"].shape
    hook = run.metadata.get("hook")
    config = {
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if str(hook).endswith(".hook_z") else "none",
        "metadata": _metadata(run),
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    with building(directory) as place:
        place.mkdir()
        text = json.dumps(config | made.config, indent=1)
        (place / "cfg.json").write_text(text + "\n")
        arrays = {key: np.ascontiguousarray(a, np.float32) for key, a in made.tensors.items()}
        safetensors.numpy.save_file(arrays, place / "sae_weights.safetensors")
        if omp:
            shutil.copy(PLUGIN, place / "omp.py")


def convert(coder: Coder, *, omp: bool = False) -> Exported:
    """A Coder's arrays and settings in SAELens's terms; see the module.

    Raises:
      UserError: SAELens has nothing that gives these codes.
    """
    normaliser, encoder = coder.normaliser, coder.encoder
    if len(normaliser.carriers):
        raise UserError(
            "export: this run keeps carriers exactly (data.keep_carriers), which SAELens's "
            "dictionaries cannot"
        )
    if omp and not isinstance(encoder, OMP):
        raise UserError(f"export: --omp is for runs coded by omp, not by {_name(encoder)}")
    mean, scale, atoms, bias = (
        np.asarray(part, np.float64)
        for part in (
            normaliser.mean, normaliser.scale, coder.dictionary.atoms, coder.dictionary.bias,
        )
    )  # fmt: skip
    b_dec = mean + scale * bias
    norm = np.linalg.norm(atoms, axis=1, keepdims=True)
    unit = np.divide(atoms, norm, out=np.zeros_like(atoms), where=norm > 0)
    match encoder:
        case Linear():
            weight, offset = (np.asarray(a, np.float64) for a in (encoder.weight, encoder.bias))
            return _linear(encoder.activation, weight / scale, offset, scale * atoms, b_dec)
        case Tied():
            return _linear(encoder.activation, unit / scale, np.zeros(len(unit)),
                           scale * unit, b_dec)  # fmt: skip
        case MPSAE():
            if not np.array_equal(encoder.weight, coder.dictionary.atoms):
                raise UserError("export: the encoder's weights are not the dictionary's atoms")
            threshold = float(encoder.threshold * scale)
            return _pursuit(atoms, b_dec, encoder.rounds, threshold, encoder.stop_on_repeat)
        case OMP() | MP() | MatryoshkaOMP() | NonNegativeOMP():
            if encoder.k is None or getattr(encoder, "tolerance", 0):
                raise UserError(
                    "export: codes end at a relative tolerance, which SAELens does not have; code "
                    "the dictionary by a pursuit with k alone (dictlearn.recode)"
                )
            if omp:
                config = {"architecture": "omp", "k": encoder.k, "apply_b_dec_to_input": True}
                return Exported(config, {"W_dec": unit, "b_dec": b_dec})
            one_sided = isinstance(encoder, NonNegativeOMP)
            both = unit if one_sided else np.concatenate([unit, -unit])
            return _pursuit(both, b_dec, encoder.k, 0.0, False)
    raise UserError(
        f"export: SAELens has nothing like {_name(encoder)}; code the dictionary by a pursuit or a "
        "linear encoder (dictlearn.recode, dictlearn.fit_encoder)"
    )


def _linear(
    activation: AbstractActivation, weight: np.ndarray, offset: np.ndarray, w_dec: np.ndarray,
    b_dec: np.ndarray,
) -> Exported:  # fmt: skip
    """Weights [m d] of raw rows; offset of rows less b_dec."""
    tensors = {"W_enc": weight.T, "W_dec": w_dec, "b_dec": b_dec}
    folded = offset - weight @ b_dec
    match activation:
        case TopK() | GradientTopK():
            return Exported(
                {"architecture": "topk", "k": activation.k}, tensors | {"b_enc": folded}
            )
        case AbsTopK():
            return Exported(
                {"architecture": "abstopk", "k": activation.k}, tensors | {"b_enc": folded}
            )
        case ReLU():
            return Exported({"architecture": "standard"}, tensors | {"b_enc": folded})
        case JumpReLU():
            threshold = np.maximum(np.asarray(activation.threshold, np.float64), 0)
            more = {"b_enc": folded, "threshold": np.broadcast_to(threshold, offset.shape)}
            return Exported({"architecture": "jumprelu"}, tensors | more)
        case Gated():
            gain, shift = (
                np.asarray(a, np.float64) for a in (activation.gain, activation.offset)
            )  # fmt: skip
            more = {"b_gate": folded, "r_mag": np.log(gain), "b_mag": shift + gain * folded}
            return Exported({"architecture": "gated"}, tensors | more)
    raise UserError(f"export: SAELens has nothing like the activation {_name(activation)}")


def _pursuit(
    w_dec: np.ndarray, b_dec: np.ndarray, rounds: int, threshold: float, stop: bool
) -> Exported:
    config = {
        "architecture": "matching_pursuit",
        "max_iterations": rounds,
        "residual_threshold": threshold,
        "stop_on_duplicate_support": stop,
        "apply_b_dec_to_input": True,  # without it b_dec counts nowhere
    }
    return Exported(config, {"W_dec": w_dec, "b_dec": b_dec})


def _name(part: Any) -> str:
    return part.name


def _metadata(run: Run) -> dict[str, Any]:
    """What SAELens's tools look for; what is not known is left out."""
    told = run.metadata
    model, harvest = told.get("model") or {}, told.get("harvest") or {}
    spec = str(model.get("spec") or "")
    hub = spec.removeprefix("hf:").partition("@")[0] if spec.startswith("hf:") else None
    found = {
        "model_name": hub or model.get("name") or model.get("description"),
        "hook_name": told.get("hook"),
        "context_size": told.get("context_length"),
        "prepend_bos": harvest["marks"] == "bos" if "marks" in harvest else told.get("prepend_bos"),
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
    }
    return {key: value for key, value in found.items() if value is not None}


def main() -> None:
    """Entry of `python -m dictlearn.interop.export`."""
    parser = argparse.ArgumentParser(
        prog="python -m dictlearn.interop.export", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--omp", action="store_true", help="as OMP, with a plugin for SAELens")
    arguments = parser.parse_args()
    run = load(arguments.run)
    export(run, arguments.directory, omp=arguments.omp)
    architecture = json.loads((arguments.directory / "cfg.json").read_text())["architecture"]
    print(f"{arguments.directory}: {architecture}, for SAELens")
    if architecture == "matching_pursuit" and not isinstance(run.coder.encoder, MPSAE):
        print(
            f"its codes there are matching pursuit's, not {_name(run.coder.encoder)}'s: the run's "
            "figures are not theirs (--omp keeps OMP, with a plugin)"
        )


if __name__ == "__main__":
    run_command(main)
