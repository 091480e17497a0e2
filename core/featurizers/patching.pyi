from featurizers_patching import load_grid as load_grid
from featurizers_patching import patch as patch
