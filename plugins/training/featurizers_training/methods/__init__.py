"""Methods of search: what is trained at a site, and which features of the source are then taken.

`Method` is the base, `GatedMethod` the base of those that train a gate. `METHODS` lists the searches, `BASELINES` what
is measured beside them and trains nothing.
"""
