"""What is published: the same facts in every distribution, and one version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import featurizers
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECTS = [ROOT / "pyproject.toml", *sorted((ROOT / "plugins").glob("*/pyproject.toml"))]
CORE = tomllib.loads(PROJECTS[0].read_text())["project"]
MAJOR, MINOR, _ = featurizers.__version__.split(".")
BOUND = f">={MAJOR}.{MINOR},<{MAJOR}.{int(MINOR) + 1}"
"""Versions of another distribution of this repository that one of this version works with."""


def project(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())["project"]


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_a_distribution_says_of_itself_what_the_others_say(path):
    same = ("version", "license", "license-files", "requires-python", "authors", "classifiers", "urls")
    assert {key: project(path)[key] for key in same} == {key: CORE[key] for key in same}
    assert (path.parent / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_distributions_of_one_version_go_together(path):
    record = project(path)
    optional = [text for texts in record.get("optional-dependencies", {}).values() for text in texts]
    own = [text for text in (*record["dependencies"], *optional) if re.match(r"featurizers(?!\[)", text)]
    for requirement in own:
        assert requirement.endswith(BOUND), requirement


def test_the_version_is_that_of_the_package_and_of_the_citation():
    assert CORE["version"] == featurizers.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == featurizers.__version__
    assert (ROOT / "CHANGELOG.md").read_text().startswith(f"# Changelog\n\n## {featurizers.__version__}")


def test_one_extra_brings_every_plugin():
    plugins = ",".join(sorted(path.parent.name for path in PROJECTS[1:]))
    assert CORE["optional-dependencies"]["all"] == [f"featurizers[{plugins}]"]


def test_the_addresses_are_those_of_one_repository():
    site = yaml.safe_load((ROOT / "docs" / "site" / "mkdocs.yml").read_text())
    urls = CORE["urls"]
    assert urls["Source"] == site["repo_url"]
    assert urls["Documentation"] == site["site_url"]
    assert urls["Changelog"].startswith(f"{urls['Source']}/")
    assert urls["Issues"] == f"{urls['Source']}/issues"


def test_the_workflow_of_the_tests_runs_each_python_that_is_named():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(CORE["classifiers"]))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "systems.yml").read_text())
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == named
    assert {system.partition("-")[0] for system in matrix["system"]} == {"ubuntu", "macos", "windows"}
