"""Portable feature spaces for mechanistic interpretability.

A featurizer maps a model's activations into a feature space and back, ``x → (features, error) → x̂``. This package
loads any featurizer by its id and intervenes through it:

    f = featurizers.load("owner/name")
    with featurizers.intervene(model, {f.site: featurizers.Interchange(f, source=other_prompt)}):
        model(**prompt)

``__init__.pyi`` lists the public names and the modules that define them. A name is imported when it is first used, so
that ``import featurizers`` does not import torch.
"""

import lazy_loader

from .store import save as save  # not when it is first used; see there

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
