"""Command ``featurizers scalars``: its options, tables and page.

This room imports everything else in the package.
"""
