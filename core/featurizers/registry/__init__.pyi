from .hookspecs import hookimpl as hookimpl
from .interventions import SavedIntervention as SavedIntervention
from .loader import PluginInfo as PluginInfo
from .plugin_host import check_plugins as check_plugins
from .plugin_host import host as host
from .plugin_host import install_command as install_command
from .plugin_host import kinds as kinds
from .plugin_host import plugins as plugins
