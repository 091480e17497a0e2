from .editing import edit as edit
from .remote import remote_edit as remote_edit

__all__ = ["edit", "remote_edit"]
