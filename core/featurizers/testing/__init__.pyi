from .contract import FeaturizerContract as FeaturizerContract
