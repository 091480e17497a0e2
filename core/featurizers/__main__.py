"""``python -m featurizers``: the command line."""

from featurizers.cli.app import main

main()
