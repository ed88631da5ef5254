"""OMP for SAELens: run this file, then load the directory that it lies in.

    import runpy; runpy.run_path("DIR/omp.py")
    sae = sae_lens.SAE.load_from_disk("DIR")

Orthogonal matching pursuit with signed codes over atoms W_dec of unit norm: k times the atom most
correlated with the residual joins the support, whose codes are then those of least squares. Least
squares are solved in float64, whatever the dtype. Written for sae_lens 6.54. Source: Pati,
Rezaiifar and Krishnaprasad, "Orthogonal matching pursuit" (1993).
"""

from dataclasses import dataclass

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig


@dataclass
class OMPSAEConfig(MatchingPursuitSAEConfig):
    """k: codes of a row, at most."""

    k: int = 1

    @classmethod
    def architecture(cls) -> str:
        return "omp"


class OMPSAE(MatchingPursuitSAE):
    """A dictionary whose codes are OMP's."""

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.process_sae_in(x)
        codes = omp(rows.reshape(-1, rows.shape[-1]).double(), self.W_dec.double(), self.cfg.k)
        return codes.reshape(*rows.shape[:-1], codes.shape[-1]).to(rows.dtype)


def omp(x: torch.Tensor, atoms: torch.Tensor, k: int) -> torch.Tensor:
    """Codes [n m] of rows [n d]."""
    codes = x.new_zeros(len(x), len(atoms))
    support = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
    left, alive = x, torch.ones(len(x), dtype=torch.bool, device=x.device)
    size = x.norm(dim=1)
    values = x.new_zeros(len(x), 0)
    for _ in range(k):
        correlation = left @ atoms.T
        correlation.scatter_(1, support, 0)
        best = correlation.abs().max(dim=1)
        alive &= best.values > 1e-12 * size
        if not alive.any():
            break
        support = torch.cat([support, best.indices[:, None]], dim=1)
        chosen = atoms[support] * 1.0  # [n t d]
        gram = chosen @ chosen.transpose(1, 2)
        solved = torch.linalg.lstsq(gram, chosen @ x[:, :, None]).solution[..., 0]
        values = torch.where(alive[:, None], solved, torch.nn.functional.pad(values, (0, 1)))
        left = x - (values[:, None] @ chosen)[:, 0]
    return codes.scatter_add_(1, support, values)


if "omp" not in SAE_CLASS_REGISTRY:
    register_sae_class("omp", OMPSAE, OMPSAEConfig)
