"""`ScalarSpec`: a named quantity with its options, and the registry that any plugin adds to.

A plugin adds quantities by the hook ``featurizers_scalars``:

    @hookimpl(optionalhook=True)
    def featurizers_scalars(register):
        register(ScalarSpec("my-plugin.surprise", make, Options, group="surprise", text="how surprising a node is"))
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from featurizers.errors import PluginError, UsageError, one_line, shown
from featurizers.registry import host
from pydantic import BaseModel, ValidationError

from featurizers_derived_scalars.derivers import Deriver

NAME: Final = re.compile(r"([a-z0-9]+(-[a-z0-9]+)*\.)?[a-z][a-z0-9_]*")
"""Lower-case words joined by ``_``; of another plugin with its name and a dot before."""


@dataclass(frozen=True)
class ScalarSpec:
    """A named quantity.

    Attributes:
        name: lower-case words joined by ``_``; of another plugin with its name before: ``my-plugin.surprise``.
        make: from the options to the deriver.
        config: pydantic model of the options, which forbids unknown ones. Some are filled in by `scalars`, if the model
            has them: ``kind`` of the basis; ``featurizers``, by kind; ``direction``, that of the metric.
        group: which scalars have comparable units, and may be ranked together.
        text: what it is, one line.
        bases: kinds of place that it is computed of unless one is named; none for a quantity that has no basis.
        aliases: other names.

    Raises:
        PluginError: the name is no such name, or the config no such model.
    """

    name: str
    make: Callable[[Any], Deriver]
    config: type[BaseModel]
    group: str
    text: str
    bases: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be registered."""
        for name in (self.name, *self.aliases):
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise PluginError(f"{shown(name)} is no name of a scalar, such as 'write_to' or 'my-plugin.surprise'")
        config = self.config
        if (
            not (isinstance(config, type) and issubclass(config, BaseModel))
            or config.model_config.get("extra") != "forbid"
        ):
            raise PluginError(f'the options of {self.name} are a pydantic model with ConfigDict(extra="forbid")')

    def deriver(self, **options: Any) -> Deriver:
        """The deriver with these options.

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


def own_specs() -> Mapping[str, ScalarSpec]:
    """The quantities of this package, by name and by alias; no other plugin is imported."""
    from featurizers_derived_scalars.plain import plain_specs
    from featurizers_derived_scalars.transformer_debugger import upstream_specs

    return {name: one for one in (*plain_specs(), *upstream_specs()) for name in (one.name, *one.aliases)}


def specs() -> Mapping[str, ScalarSpec]:
    """Every registered quantity, by name and by alias; imports all plugins.

    Raises:
        PluginError: two have one name, or one of another plugin has no prefix.
    """
    own = own_specs()
    found: dict[str, ScalarSpec] = {}

    def register(one: ScalarSpec) -> None:
        if not isinstance(one, ScalarSpec):
            raise PluginError(f"a plugin registers {shown(one)}, which is no ScalarSpec")
        for name in (one.name, *one.aliases):
            if name in found:
                raise PluginError(f"the scalar {name} is registered twice; uninstall one of the plugins that do")
            if one.name not in own and "." not in name:
                raise PluginError(
                    f"the scalar {name} of another plugin needs the plugin's name before: 'plugin.{name}'"
                )
            found[name] = one

    host().ask("featurizers_scalars", register=register)
    return MappingProxyType(found)


def spec(name: str) -> ScalarSpec:
    """The registered quantity of a name or an alias, in lower or upper case.

    Other plugins are imported only if the name is not one of this package, so that a faulty one does not stand in
    the way.

    Raises:
        UsageError: there is none; the message has names that are like it.
        PluginError: as `specs`.
    """
    if not isinstance(name, str):
        raise UsageError(f"the name of a scalar is a string, not {shown(name)}")
    if (found := own_specs().get(name.lower())) is not None:
        return found
    known = specs()
    if (found := known.get(name) or known.get(name.lower())) is not None:
        return found
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"like it: {', '.join(near)}" if near else f"there are {', '.join(sorted(known))}"
    raise UsageError(f"there is no scalar {shown(name)}; {hint}")


def deriver(name: str, /, **options: Any) -> Deriver:
    """The deriver of a registered quantity: ``deriver("write_to", kind="mlp.neurons")``.

    Raises:
        UsageError: there is no such quantity, or the options are not its own.
    """
    return spec(name).deriver(**options)
