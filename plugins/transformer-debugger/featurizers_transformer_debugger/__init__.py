"""transformer-debugger's names and classes, over quantities and derivers of `featurizers_derived_scalars`.

Code that composes its scalar derivers runs here with its imports changed, on any decoder. A `ScalarDeriver` makes a
`featurizers_derived_scalars.Deriver` for each pass that it can be derived in. Two things differ on purpose: a
transformed deriver offers only the pass whose output it transforms, where transformer-debugger gives forward values
under the name of the backward pass; and no call changes the store.

``__init__.pyi`` lists the public names and where each is defined. A name is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
