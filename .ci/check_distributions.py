"""Look at what archives hold: the licence, the README, the addresses, the marker of types, and one package."""

import re
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path


def content(archive: Path) -> tuple[list[str], Message]:
    """Return the paths in a wheel or a source distribution, and its metadata."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            paths = wheel.namelist()
            (metadata,) = [path for path in paths if re.fullmatch(r"[^/]+\.dist-info/METADATA", path)]
            return paths, BytesParser().parsebytes(wheel.read(metadata))
    with tarfile.open(archive) as source:
        paths = source.getnames()
        (metadata,) = [path for path in paths if re.fullmatch(r"[^/]+/PKG-INFO", path)]
        file = source.extractfile(metadata)
        assert file is not None
        return paths, BytesParser().parsebytes(file.read())


def faults(archive: Path) -> list[str]:
    """Return what is wrong with an archive, as sentences."""
    paths, metadata = content(archive)
    package = metadata["Name"].replace("-", "_")
    code = package if archive.suffix == ".whl" else rf"[^/]+/(core/)?{package}"
    found = []
    for what, pattern in {
        "licence": r"[^/]+\.dist-info/licenses/LICENSE" if archive.suffix == ".whl" else r"[^/]+/LICENSE",
        "py.typed": rf"{code}/py\.typed",
        "__init__.py": rf"{code}/__init__\.py",
    }.items():
        if not any(re.fullmatch(pattern, path) for path in paths):
            found.append(f"no {what}")
    if archive.suffix == ".whl":
        strangers = {path.split("/")[0] for path in paths if ".dist-info/" not in path} - {package}
        found += [f"{name} beside the package" for name in sorted(strangers)]
    if not metadata.get_payload():
        found.append("no README in the metadata")
    if metadata["License-Expression"] != "Apache-2.0":
        found.append("no licence in the metadata")
    if not metadata.get_all("Project-URL"):
        found.append("no addresses in the metadata")
    return found


def main() -> None:
    """Check the archives that are named, and end with an error if one is faulty."""
    archives = [Path(name) for name in sys.argv[1:]]
    wrong = [f"{archive.name}: {fault}" for archive in archives for fault in faults(archive)]
    print("\n".join(wrong) or f"{len(archives)} archives: licence, README, addresses and types are in each")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
