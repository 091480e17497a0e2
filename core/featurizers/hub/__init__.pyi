from .repository import Remote as Remote
from .searching import FoundRepository as FoundRepository
from .searching import search as search
from .sources import REPO_ID as REPO_ID
from .sources import FolderSource as FolderSource
from .sources import HubSource as HubSource
from .sources import parse_source as parse_source
