"""Run the command line: ``python -m featurizers``."""

from featurizers.cli.app import main

main()
