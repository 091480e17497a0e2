from .graph_files import load_graph as load_graph
from .graphing import graph as graph
from .influence import Bounds as Bounds
from .influence import Scores as Scores
from .result import Edge as Edge
from .result import Graph as Graph
from .result import Node as Node
from .result import Target as Target
