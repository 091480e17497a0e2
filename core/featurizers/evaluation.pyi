from featurizers_evaluate import evaluate as evaluate
from featurizers_evaluate import load_evaluation as load_evaluation
from featurizers_evaluate import report as report
