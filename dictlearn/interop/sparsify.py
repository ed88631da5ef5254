"""EleutherAI sparsify directories: cfg.json and sae.safetensors.

    codes = topk(ReLU((x - b_dec) encoder.weight^T + encoder.bias)),    x_hat = codes W_dec + b_dec

encoder.weight [m d], encoder.bias [m], W_dec [m d], b_dec [d]. Dictionaries of before 2025 may be
`signed`: without the ReLU, and the k largest in size. `multi_topk` is about training alone.

The directory's name is the module whose output was read: of `layers.N` (or `h.N`) the hook is
`blocks.N.hook_resid_post`, of others None. The model stands in the config.json of the directory
above.

Source: sparsify at 9d3b136, sparse_coder.py and fused_encoder.py; `signed`: at a48257e.
"""

from __future__ import annotations

import re
from pathlib import Path

from dictlearn.artifact import ArtifactError, Run
from dictlearn.encoders.activations import AbsTopK, TopK
from dictlearn.interop import assemble, files

SHAPES = {"encoder.weight": "m d", "encoder.bias": "m", "W_dec": "m d", "b_dec": "d"}


def read(file: Path) -> Run:
    """The dictionary in sae.safetensors, with the cfg.json beside it.

    Raises:
      ArtifactError: a file is missing or damaged; it holds a transcoder, a skip connection or
        another activation; a tensor does not fit.
    """
    place = file.with_name("cfg.json")
    config = files.table(place)
    if (activation := config.get("activation", "topk")) != "topk":
        raise ArtifactError(f"{place}: activation is {activation!r}; can be read: topk")
    for key in ("transcode", "skip_connection"):
        if config.get(key):
            raise ArtifactError(
                f"{place}: {key} is set: x_hat is not made of codes of x alone; "
                "a dictionary has one hook"
            )
    k = files.setting(place, config, "k", int)
    held = files.fitting(
        file, files.tensors(file), SHAPES, d=config.get("d_in"), m=config.get("num_latents") or None
    )
    coder = assemble.linear(
        w_enc=held["encoder.weight"].T, b_enc=held["encoder.bias"],
        w_dec=held["W_dec"], b_dec=held["b_dec"], centred=True,
        activation=AbsTopK(k) if config.get("signed") else TopK(k),
    )  # fmt: skip
    above = file.parent.absolute().with_name("config.json")
    trained = files.table(above) if above.exists() else {}
    layer = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)", file.parent.absolute().name)
    return assemble.run(
        file,
        coder,
        format="sparsify",
        config=config,
        hook=f"blocks.{layer[1]}.hook_resid_post" if layer else None,
        model=trained.get("model"),
        context_length=trained.get("ctx_len"),
    )
