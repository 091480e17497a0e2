"""Write the distribution of a new kind of featurizer: ``featurizers new-plugin``.

`scaffold` writes the files from the templates in ``template``, `command` is the command.
"""
