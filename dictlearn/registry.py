"""Names to classes: a new solver or encoder is one file and one line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dictlearn.encoders import activations
from dictlearn.encoders.linear import Linear, Tied
from dictlearn.encoders.matryoshka_omp import MatryoshkaOMP
from dictlearn.encoders.mp import MP
from dictlearn.encoders.mp_sae import MPSAE
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.nnls import NNLS
from dictlearn.encoders.omp import OMP
from dictlearn.solvers.ksvd import KSVD
from dictlearn.solvers.sae import SAE
from dictlearn.solvers.snmf import SNMF
from dictlearn.solvers.untrained import Untrained

Solver = Annotated[KSVD | SAE | SNMF | Untrained, Field(discriminator="name")]

# Everything that an artifact can hold, by the `name` it is saved under.
ENCODERS = {
    "omp": OMP,
    "nn_omp": NonNegativeOMP,
    "nnls": NNLS,
    "mp": MP,
    "matryoshka_omp": MatryoshkaOMP,
    "mp_sae": MPSAE,
    "linear": Linear,
    "tied": Tied,
    "topk": activations.TopK,
    "abs_topk": activations.AbsTopK,
    "relu": activations.ReLU,
    "jumprelu": activations.JumpReLU,
    "gated": activations.Gated,
    "gradient_topk": activations.GradientTopK,
}
