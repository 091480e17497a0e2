"""``python -m featurizers``: the command line."""

from featurizers.cli import main

main()
