"""`ScalarSpec`: a named quantity and its options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from featurizers import Featurizer
from featurizers.errors import PluginError, UsageError, one_line, shown
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from featurizers_derived_scalars.nodes import HEADS, Basis, Part, Via
from featurizers_derived_scalars.quantities import Deriver

NAME: Final = re.compile(r"([a-z0-9]+(-[a-z0-9]+)*\.)?[a-z][a-z0-9_]*")
"""Lower-case words joined by ``_``; a name of another plugin begins with the plugin's name and a dot."""


@dataclass(frozen=True)
class ScalarSpec:
    """A named quantity.

    A plugin registers quantities in the hook ``featurizers_scalars``:

        @hookimpl(optionalhook=True)
        def featurizers_scalars(register):
            register(ScalarSpec.of(surprise, "surprise", "how surprising a node is", name="my-plugin.surprise"))

    Attributes:
        name: lower-case words joined by ``_``; for another plugin with its name before: ``my-plugin.surprise``.
        make: from the options to the deriver.
        config: pydantic model of the options, which forbids unknown options. `scalars` fills in some, if the model has
            them: ``kind`` of the basis; ``featurizers``, by kind; ``direction``, the metric's.
        group: units; quantities of one group may be ranked together.
        text: one line that says what it is.
        bases: bases that it is computed of unless one is named; empty for a quantity without a basis.
        aliases: other names.

    Raises:
        PluginError: a name or the config is not of that form.
    """

    name: str
    make: Callable[[Any], Deriver]
    config: type[BaseModel]
    group: str
    text: str
    bases: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the names and the config."""
        for name in (self.name, *self.aliases):
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise PluginError(f"{shown(name)} is no name of a scalar, such as 'write_to' or 'my-plugin.surprise'")
        is_model = isinstance(self.config, type) and issubclass(self.config, BaseModel)
        if not is_model or self.config.model_config.get("extra") != "forbid":
            raise PluginError(f'the options of {self.name} are a pydantic model with ConfigDict(extra="forbid")')

    @classmethod
    def of(
        cls,
        function: Callable[..., Deriver],
        group: str,
        text: str,
        bases: tuple[str, ...] = (),
        *,
        name: str | None = None,
        whole: bool = False,
        via: bool = False,
    ) -> ScalarSpec:
        """Return the spec of a function, whose parameters are the options.

        A parameter ``basis`` is given by the options ``kind``, ``featurizers``, ``part`` and ``whole`` of a `Basis`.

        Args:
            function: returns the deriver.
            group: units.
            text: one line that says what it is.
            bases: bases that it is computed of unless one is named.
            name: its name; the function's own if None.
            whole: default of the option ``whole``.
            via: add an option ``via`` to those of the basis; it is ignored unless the basis is of heads.
        """
        parameters = inspect.signature(function, eval_str=True).parameters
        fields: dict[str, Any] = {}
        if "basis" in parameters:
            fields |= {**_BASIS, "whole": (bool, whole), **({"via": (Via | None, None)} if via else {})}
        own = {option: parameter for option, parameter in parameters.items() if option != "basis"}
        for option, parameter in own.items():
            default = Field() if parameter.default is parameter.empty else parameter.default
            fields[option] = (parameter.annotation, default)
        name = function.__name__ if name is None else name
        config: type[BaseModel] = create_model(
            f"{name} options", __config__=ConfigDict(arbitrary_types_allowed=True, extra="forbid"), **fields
        )

        def make(options: Any) -> Deriver:
            arguments = {option: getattr(options, option) for option in own}
            return function(**arguments, **({"basis": _basis(options)} if "basis" in parameters else {}))

        return cls(name, make, config, group, text, bases)

    def deriver(self, **options: Any) -> Deriver:
        """Return the deriver with these options.

        Raises:
            UsageError: an option is missing, unknown or of the wrong type; the message names it.
        """
        try:
            return self.make(self.config(**options))
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            takes = ", ".join(self.config.model_fields) or "none"
            raise UsageError(
                f"{self.name} cannot be made of these options: {one_line(faults)}. It takes {takes}."
            ) from error


_BASIS: Final[dict[str, Any]] = {
    "kind": (str, Field()),
    "featurizers": (Mapping[str, Featurizer[Any] | Mapping[int, Featurizer[Any]]], {}),
    "part": (Part, "features"),
}


def _basis(options: Any) -> Basis:
    basis = Basis(options.kind, options.featurizers.get(options.kind), options.part, whole=options.whole)
    via = getattr(options, "via", None)
    return replace(basis, via=via) if options.kind in (HEADS, "attn.logits") else basis
