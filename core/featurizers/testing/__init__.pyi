from .contract import FeaturizerContract as FeaturizerContract
from .site_map_contract import SiteMapContract as SiteMapContract
