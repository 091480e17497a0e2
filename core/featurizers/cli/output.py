"""Output of commands."""

from __future__ import annotations

import json
from typing import Any


def print_json(data: Any) -> None:
    """Print data as JSON with ASCII characters alone, as ``--json`` asks."""
    print(json.dumps(data, indent=2, ensure_ascii=True))
