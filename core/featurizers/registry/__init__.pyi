from .hookspecs import hookimpl as hookimpl
from .loader import PluginInfo as PluginInfo
from .plugin_host import build as build
from .plugin_host import check_plugins as check_plugins
from .plugin_host import checked_class as checked_class
from .plugin_host import host as host
from .plugin_host import kinds as kinds
from .plugin_host import plugins as plugins
