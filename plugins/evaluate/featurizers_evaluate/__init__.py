"""Measure any featurizer on a language model: reconstruction, sparsity, effect on the model; and report its features.

`evaluate` and `report` are the entries. The files, lowest first: `definitions` of the metrics, `documents` (the data),
`labels` (of other programs), `sums` over tokens, with resamples of documents, `subjects` (what is measured), `options`,
`runs` of the model, `harvests` (what is read in the place of runs), `measuring` (one reading of the data), `result`,
`summary` (metrics from sums), `of_plugins` (metrics that other plugins measure), `pictures`, `comparison`,
`evaluating`, `reporting` (what each feature does, and a page of it), `command`.

``__init__.pyi`` lists the public names. A name is imported when it is first used. This module has no ``__dir__``,
because pluggy would get each name that it lists.
"""

from typing import Any

import lazy_loader
from featurizers import hookimpl

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


@hookimpl
def featurizers_commands(app: Any) -> None:
    """Add ``evaluate``, ``compare``, ``labels`` and ``report``."""
    from featurizers_evaluate.command.compare import compare_command
    from featurizers_evaluate.command.evaluate import evaluate_command
    from featurizers_evaluate.command.labels import labels_command
    from featurizers_evaluate.command.report import report_command

    app.command("labels")(labels_command)
    app.command("evaluate")(evaluate_command)
    app.command("compare")(compare_command)
    app.command("report")(report_command)
