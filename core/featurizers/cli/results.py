"""Results of a long command: written in one step, and never over those of another program."""

from __future__ import annotations

import itertools
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from featurizers.errors import ArtefactError, printable
from featurizers.files import filling, resolved


def write_results(out: Path, write: Callable[[Path], object]) -> Path:
    """Write results to a new folder in one step, and return the folder.

    If another program has filled the folder since the command began, the results go to ``OUT-2``, ``OUT-3`` and so on,
    with a warning: to refuse them now would lose the work.

    Args:
        out: new or empty folder, which the command checked when it began.
        write: writes to the folder that it is given, which has the last name of ``out`` and does not exist yet.

    Raises:
        ArtefactError: the folder cannot be written.
    """
    wanted = target = out.expanduser()
    for number in itertools.count(2):
        try:
            with filling(target) as scratch:
                above = scratch / uuid.uuid4().hex  # a result may have the name of the folder
                above.mkdir()
                new = above / resolved(target).name
                write(new)
                for path in new.iterdir():
                    path.rename(scratch / path.name)
                new.rmdir()
                above.rmdir()
            break
        except ArtefactError:
            if not target.is_dir() or not any(target.iterdir()):
                raise
        target = wanted.with_name(f"{resolved(wanted).name}-{number}")
    if target != wanted:
        text = f"another program has written to {printable(str(wanted), 500)} meanwhile; the results are in {target}"
        sys.stderr.write(f"warning: {printable(text, 1100)}\n")
    return target
