"""Registry of named quantities: those of this package, and those that other plugins add."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from featurizers.errors import PluginError, UsageError, shown
from featurizers.registry import host, install_command

from featurizers_derived_scalars.builtin_quantities import SPECS
from featurizers_derived_scalars.quantities import Deriver
from featurizers_derived_scalars.specs import ScalarSpec

OWN: Final[Mapping[str, ScalarSpec]] = MappingProxyType({one.name: one for one in SPECS})
"""Quantities of this package, by name."""


def specs() -> Mapping[str, ScalarSpec]:
    """Return every registered quantity, by name and by alias; import all plugins.

    Raises:
        PluginError: two quantities have one name, or a name of another plugin has no prefix.
    """
    by_name: dict[str, ScalarSpec] = {}

    def register(one: ScalarSpec) -> None:
        if not isinstance(one, ScalarSpec):
            raise PluginError(f"a plugin registers {shown(one)}, which is no ScalarSpec")
        for name in (one.name, *one.aliases):
            if name in by_name:
                raise PluginError(f"the scalar {name} is registered twice; uninstall one of the plugins that do")
            if one.name not in OWN and "." not in name:
                raise PluginError(
                    f"the scalar {name} of another plugin needs the plugin's name before: 'plugin.{name}'"
                )
            by_name[name] = one

    host().ask("featurizers_scalars", register=register)
    return MappingProxyType(by_name)


def spec(name: str) -> ScalarSpec:
    """Return the registered quantity of a name or an alias, in lower or upper case.

    A name without a prefix may also be the name of another plugin's quantity without its prefix, if only one plugin has
    such a quantity. Other plugins are imported only if this package has no quantity of that name, so that a faulty
    plugin does not stand in the way.

    Raises:
        UsageError: no quantity, or more than one, has the name; the message lists names like it.
        PluginError: as `specs`.
    """
    if not isinstance(name, str):
        raise UsageError(f"the name of a scalar is a string, not {shown(name)}")
    if (own := OWN.get(name.lower())) is not None:
        return own
    known = specs()
    if (found := known.get(name) or known.get(name.lower())) is not None:
        return found
    short = {full: full.partition(".")[2] for full in known}
    matches = [full for full, word in short.items() if word == name.lower()]
    if len(matches) == 1:
        return known[matches[0]]
    if matches:
        raise UsageError(f"several plugins have a scalar {shown(name)}; say which: {', '.join(matches)}")
    near = difflib.get_close_matches(name.lower(), {*known, *short.values()} - {""}, n=3, cutoff=0.5)
    hint = f"like it: {', '.join(near)}" if near else f"`featurizers scalars --list` shows all {len(known)}"
    raise UsageError(f"there is no scalar {shown(name)}; {hint}{_missing_package()}")


def _missing_package() -> str:
    """Return a sentence on the package of transformer-debugger's names, unless it is installed."""
    package = "transformer-debugger"
    return "" if package in host().names() else f". Names of {package} need another package: {install_command(package)}"


def deriver(name: str, /, **options: Any) -> Deriver:
    """Return the deriver of a registered quantity: ``deriver("write_to", kind="mlp.neurons")``.

    Raises:
        UsageError: the quantity is not registered, or does not take these options.
    """
    return spec(name).deriver(**options)
