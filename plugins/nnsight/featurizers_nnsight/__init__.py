"""Edits of features inside the traces of nnsight: `edit` here and now, `remote_edit` for a server.

`featurizers.intervene`, `collect` and `attach` take a model of nnsight as well; `plugin` says how it holds a model.
"""

from featurizers_nnsight.editing import edit
from featurizers_nnsight.remote import remote_edit

__all__ = ["edit", "remote_edit"]
