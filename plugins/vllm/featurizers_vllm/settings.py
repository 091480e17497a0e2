"""`Settings`: what the operator of a server allows, in JSON that the variable ``FEATURIZERS_VLLM`` names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from featurizers.errors import FeaturizerError, explain, shown
from featurizers.format import Site, parse_json
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from featurizers_vllm.errors import ServerError

VARIABLE: Final = "FEATURIZERS_VLLM"
KINDS: Final = ("resid.post", "attn.out", "mlp.out")
"""Kinds of site that can be armed."""


class Allowed(BaseModel):
    """One featurizer that requests may name.

    Attributes:
        id: name in requests.
        revision: commit or any other version; a request that names another one is refused.
        path: folder of the artefact; a relative one is relative to the file of the settings.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: Annotated[str, Field(min_length=1, max_length=200)]
    revision: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    path: Annotated[str, Field(min_length=1)]

    @property
    def name(self) -> str:
        """The id, with the revision if there is one."""
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


class Settings(BaseModel):
    """What the operator allows.

    Attributes:
        version: of this form.
        sites: armed sites; a request can edit no other.
        featurizers: the only featurizers that requests can name. They are read when the server starts.
        features: most features that one operation of a request can edit.
        operations: most operations of a request at one site.
        untested: start also where no test of this package was run, as on vLLM's V2 model runner.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    version: Literal[1]
    sites: Annotated[list[str], Field(min_length=1)]
    featurizers: Annotated[list[Allowed], Field(min_length=1)]
    features: Annotated[int, Field(ge=1, le=4096)] = 8
    operations: Annotated[int, Field(ge=1, le=16)] = 2
    untested: bool = False

    @field_validator("sites")
    @classmethod
    def _are_armable(cls, sites: list[str]) -> list[str]:
        for text in sites:
            try:
                site = Site.parse(text)
            except FeaturizerError as error:
                raise ValueError(str(error)) from error
            if site.kind == "resid.pre" and site.layer:
                raise ValueError(f"{text!r} is where block {site.layer - 1} ends; arm 'resid.post:{site.layer - 1}'")
            if site.kind not in KINDS:
                raise ValueError(f"{shown(text)} cannot be armed; arm sites of the kinds {', '.join(KINDS)}")
        if len(set(map(Site.parse, sites))) < len(sites):
            raise ValueError("a site is named twice")
        return [str(Site.parse(text)) for text in sites]

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Settings:
        names = [each.name for each in self.featurizers]
        if len(set(names)) < len(names):
            raise ValueError("a featurizer is named twice; give each its own id or revision")
        return self

    @classmethod
    def parse(cls, raw: bytes, where: str, folder: Path) -> Settings:
        """Return the settings of JSON; relative paths are relative to ``folder``.

        Raises:
            ServerError: they are malformed.
        """
        try:
            found = cls.model_validate(parse_json(raw, where, "the JSON"))
        except ValidationError as error:
            raise ServerError(f"{where}: {explain(error)}") from error
        except FeaturizerError as error:
            raise ServerError(str(error)) from error
        allowed = [each.model_copy(update={"path": str(folder / each.path)}) for each in found.featurizers]
        return found.model_copy(update={"featurizers": allowed})

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings | None:
        """Return the settings of the file, or of the JSON, that `VARIABLE` holds; None if it is not set.

        Raises:
            ServerError: it is empty, the file cannot be read, or the settings are malformed.
        """
        value = environment.get(VARIABLE)
        if value is None:
            return None
        if value.lstrip().startswith("{"):
            return cls.parse(value.encode(), VARIABLE, Path.cwd())
        path = Path(value).expanduser()
        try:
            raw = path.read_bytes()
        except (OSError, ValueError) as error:
            raise ServerError(
                f"{VARIABLE} is {shown(value)}, which cannot be read ({error}); set it to a file of JSON, or unset it "
                "to serve without edits"
            ) from error
        return cls.parse(raw, str(path), path.parent)

    @property
    def armed(self) -> tuple[Site, ...]:
        """Armed sites."""
        return tuple(map(Site.parse, self.sites))

    def summary(self) -> dict[str, Any]:
        """Return what decides how the model is compiled."""
        return {"sites": self.sites, "features": self.features, "operations": self.operations}
