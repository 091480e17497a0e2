from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn

def bind(base: type, featurizer: Any, **fixed: int) -> type: ...
def load_intervenable(
    source: str | Path,
    model: nn.Module,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device: torch.device | str | None = None,
) -> Any: ...
def push_intervenable(intervenable: Any, repo_id: str, **options: Any) -> CommitInfo: ...
def save_intervenable(intervenable: Any, folder: str | Path) -> Path: ...
def __getattr__(name: str) -> Any: ...
