"""Build the documentation site: ``python docs/site/build.py [FOLDER]``, by default in ``build/site``.

The pages in ``docs/`` stay readable in a checkout, so this script makes what only the site needs: the API pages, which
list the public names of each distribution, and absolute links to files outside ``docs/``. Zensical
then builds it, and ends with an error for each link that leads nowhere.
"""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "core/featurizers"
CONFIG = ROOT / "docs/site/mkdocs.yml"
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Pages of the repository that are pages of the site too."""
GROUPS = {
    "Load, save and share": (
        "load save save_collection list_artefacts push push_featurizer convert "
        "create kinds plugins check_plugins PluginInfo"
    ),
    "Intervene": (
        "intervene collect prepare attach Attached replaced Interchange Steer Ablate Mask Collect lower Program"
    ),
    "Models and sites": "Site Anatomy load_model LanguageModel",
    "Featurizers": (
        "FeatureSpace Featurizer SiteMap DictionaryFeaturizer compose Error SigmoidGate activation_rule hookimpl"
    ),
}
"""Public names of the core by what they are for; names that stand in no group come last."""
FORWARDING = re.compile(r'^__getattr__ = attributes_of\("([a-z-]+)"', re.MULTILINE)
"""Line of a module of the core whose names are those of a plugin."""
ASKING = re.compile(
    r"""<(?:script|img|iframe|audio|video|source|embed)\b[^>]*?\ssrc=["']?(?:https?:)?//"""
    r"""|<link\b(?=[^>]*\srel=["']?(?:stylesheet|icon|preload|modulepreload|prefetch|preconnect|dns-prefetch|manifest))"""
    r"""[^>]*\shref=["']?(?:https?:)?//"""
    r"""|\sdata-md-component=["']?source\b"""
)
"""What makes a browser ask another host; at the last of these the theme's script asks GitHub for its stars."""


def names(package: Path, module: str | None = None) -> list[str]:
    """Return the public names of a package, or those that it takes from one of its modules, without importing it."""
    stub = package / "__init__.pyi"
    if stub.exists():
        source = r"\S+" if module is None else rf"\.{module}"
        return re.findall(rf"^from {source} import \w+ as (\w+)$", stub.read_text(), re.MULTILINE)
    for statement in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(statement.value))
    return []


def api_pages() -> dict[str, str]:
    """Return the text of each API page by its path in the site."""
    known = [name for name in names(CORE) if name not in ("errors", "pyvene")]
    known.remove("__version__")
    groups = {title: text.split() for title, text in GROUPS.items()}
    if unknown := {name for group in groups.values() for name in group} - set(known):
        raise SystemExit(f"docs/site/build.py lists names that the core does not have: {', '.join(sorted(unknown))}")
    forwarded = {}
    for module in sorted(CORE.glob("*.py")):
        if plugin := FORWARDING.search(module.read_text()):
            forwarded |= dict.fromkeys(names(CORE, module.stem), f"featurizers-{plugin[1]}")
    listed = {*forwarded, *(name for group in groups.values() for name in group)}
    groups["Others"] = [name for name in known if name not in listed]
    core = "# featurizers\n\nThe names of the package `featurizers`.\n"
    core += "".join(f"\n## {title}\n\n" + _directives("featurizers", group) for title, group in groups.items() if group)
    core += "\n## Of plugins\n\nThese names are those of plugins, and say which to install where one is missing.\n\n"
    core += "".join(
        f"- [`{name}`]({plugin}.md#{plugin.replace('-', '_')}.{name})\n" for name, plugin in forwarded.items()
    )
    errors = "# featurizers.errors\n\nEvery error of this library is one of these.\n\n::: featurizers.errors\n"
    pages = {"api/featurizers.md": core, "api/errors.md": errors}
    for project in sorted((ROOT / "plugins").glob("*/pyproject.toml")):
        metadata = tomllib.loads(project.read_text())["project"]
        module = metadata["name"].replace("-", "_")
        if public := names(project.parent / module):
            text = f"# {metadata['name']}\n\n{metadata['description']}\n\n`pip install {metadata['name']}`\n\n"
            pages[f"api/{metadata['name']}.md"] = text + _directives(module, public)
    listed = "\n".join(f"- [{Path(path).stem}]({Path(path).name})" for path in pages)
    pages["api/index.md"] = f"# API\n\nThe public names, by distribution. Everything else is private.\n\n{listed}\n"
    return pages


def _directives(module: str, public: list[str]) -> str:
    return "".join(f"::: {module}.{name}\n\n" for name in public)


def repository() -> str:
    """Return the address of the repository."""
    source = re.search(r"^repo_url: (\S+)$", CONFIG.read_text(), re.MULTILINE)
    assert source
    return source[1]


def outward(text: str) -> str:
    """Return a page with its links to other files of the repository made absolute, or to pages of the site."""
    for page in PAGES:
        text = text.replace(f"](../{page}", f"]({page}")
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    text = re.sub(r"\]\((tutorials/[a-z-]+)\.ipynb\)", r"](\1.md)", text)
    folders = "benchmarks|core|examples|plugins|tests|LICENSE"
    return re.sub(rf"\]\((?:\.\./)?((?:{folders})(?:[/#][^)]*)?)\)", rf"]({repository()}/blob/main/\1)", text)


def write(folder: Path) -> None:
    """Write the pages and the configuration of the site into a folder."""
    import notebooks  # beside this file

    pages = folder / "docs"
    shutil.copytree(ROOT / "docs", pages, ignore=shutil.ignore_patterns("site", "tutorials"))
    shutil.copytree(ROOT / "docs/site/overrides", folder / "overrides")
    for name in PAGES:
        shutil.copy(ROOT / name, pages)
    for notebook in sorted(notebooks.FOLDER.glob("*.ipynb")):
        notebooks.page(notebook, pages, repository())
    for path in pages.glob("*.md"):
        path.write_text(outward(path.read_text(encoding="utf-8")), encoding="utf-8")
    api = api_pages()
    for name, text in api.items():
        (pages / name).parent.mkdir(exist_ok=True)
        (pages / name).write_text(text, encoding="utf-8")
    for name in ("core", "plugins"):
        (folder / name).symlink_to(ROOT / name)
    config = CONFIG.read_text()
    for line, more in (
        ("            - core\n", [project.relative_to(ROOT) for project in sorted((ROOT / "plugins").iterdir())]),
        ("      - api/index.md\n", [name for name in api if name != "api/index.md"]),
    ):
        indent = line[: -len(line.lstrip())]
        config = config.replace(line, line + "".join(f"{indent}- {each}\n" for each in more))
    (folder / "mkdocs.yml").write_text(config)


def asking(site: Path) -> list[str]:
    """Return the pages of a site at which a browser would ask another host."""
    pages = sorted(site.rglob("*.html"))
    return [str(page.relative_to(site)) for page in pages if ASKING.search(page.read_text(encoding="utf-8"))]


def main() -> None:
    """Build the site."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/site").resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder)
        done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder, check=False)
        if done.returncode:
            raise SystemExit("the site has faults, which are listed above")
        if pages := asking(folder / "site"):
            raise SystemExit(f"these pages ask other hosts than their own: {', '.join(pages)}")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder / "site", target)
    print(f"Written: {target}/index.html")


if __name__ == "__main__":
    main()
