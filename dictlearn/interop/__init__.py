"""Others' dictionaries, read with numpy and safetensors alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dictlearn import artifact
from dictlearn.artifact import ArtifactError, Run
from dictlearn.interop import gemma_scope, saelens, sparsify

# The file that holds a format's weights, by which it is told from the others.
FORMATS: dict[str, Callable[[Path], Run]] = {
    "sae_weights.safetensors": saelens.read,
    "params.npz": gemma_scope.read,
    "params.safetensors": gemma_scope.read,
    "sae.safetensors": sparsify.read,
}


def load(path: Path | str) -> Run:
    """Load a run of ours, or another's dictionary: SAELens, Gemma Scope 1 and 2, sparsify.

    Arguments:
      path: its directory, or a file in it; "hf:OWNER/NAME" for a run of ours on the hub.

    Returns:
      The Run. Of another's, `metrics` is empty, and `metadata` holds "format", "hook",
      "model" {"name"}, "context_length", "prepend_bos" and "source config", None where unknown.

    Raises:
      ArtifactError: there is none, a file is damaged, or it is of a kind that codes of one hook's
        rows cannot express exactly.
    """
    if str(path).startswith("hf:"):
        from dictlearn.interop import hub

        return artifact.load(hub.pull(str(path).removeprefix("hf:")))
    path = Path(path)
    if path.is_file() and path.name in FORMATS:
        return FORMATS[path.name](path)
    folder = path.parent if path.is_file() else path
    if any((folder / name).exists() for name in (artifact.METADATA, artifact.UNFINISHED)):
        return artifact.load(folder)
    found = [folder / name for name in FORMATS if (folder / name).exists()]
    if not found:
        raise ArtifactError(
            f"{path}: no run there (it has no {artifact.METADATA}), nor another's dictionary "
            f"({', '.join(FORMATS)})"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ArtifactError(f"{path}: holds several dictionaries; name one of the files: {names}")
    return FORMATS[found[0].name](found[0])
