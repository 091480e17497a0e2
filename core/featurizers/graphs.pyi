from featurizers_graphs import graph as graph
from featurizers_graphs import load_graph as load_graph
