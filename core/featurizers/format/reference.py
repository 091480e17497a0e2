"""References: an artefact whose featurizer is that of a repository of the Hub at one commit."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from featurizers.errors import ManifestError, explain
from featurizers.format.manifest import Manifest, Subfolder

KIND: Final = "reference"
"""Kind in the config of such an artefact; no class has it."""


class Reference(BaseModel):
    """Where on the Hub a featurizer is.

    Attributes:
        repository: ``owner/name``.
        revision: the commit.
        subfolder: folder of the repository; its root if None.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    repository: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", max_length=256)]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")]
    subfolder: Subfolder | None = None

    def __str__(self) -> str:
        """Return ``owner/name@commit/subfolder``."""
        return f"{self.repository}@{self.revision}" + (f"/{self.subfolder}" if self.subfolder else "")


def reference_in(manifest: Manifest, where: str) -> Reference | None:
    """Return what a manifest refers to; None if the artefact has its featurizer itself.

    Raises:
        ManifestError: the reference is malformed.
    """
    if manifest.kind != KIND:
        return None
    try:
        return Reference.model_validate(manifest.config)
    except ValidationError as error:
        raise ManifestError(where, f"the reference in its config is malformed: {explain(error)}") from error
