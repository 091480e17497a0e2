"""Print the lowest version of each direct dependency that the bounds allow, as constraints for pip."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def requirements() -> Iterator[Requirement]:
    """Yield what the tests and all distributions with all their extras require, siblings left out."""
    tests = (ROOT / "requirements" / "test.txt").read_text().splitlines()
    lines = [line for line in tests if not line.startswith("#")]
    for pyproject in [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]:
        project = tomllib.loads(pyproject.read_text())["project"]
        lines += project["dependencies"]
        for extra in project.get("optional-dependencies", {}).values():
            lines += extra
    for line in lines:
        requirement = Requirement(line)
        if not requirement.name.startswith("featurizers"):
            yield requirement


def lower_bound(requirement: Requirement) -> Version:
    """Return the version after ``>=``.

    Raises:
        SystemExit: the requirement has no lower bound.
    """
    bounds = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
    if not bounds:
        raise SystemExit(f"{requirement} has no lower bound: write {requirement.name}>=VERSION")
    return max(bounds)


def main() -> None:
    """Print a line ``name==version`` for each dependency: the highest of the bounds of all distributions."""
    lowest: dict[str, Version] = {}
    for requirement in requirements():
        name, bound = canonicalize_name(requirement.name), lower_bound(requirement)
        lowest[name] = max(bound, lowest.get(name, bound))
    print("\n".join(f"{name}=={version}" for name, version in sorted(lowest.items())))


if __name__ == "__main__":
    main()
