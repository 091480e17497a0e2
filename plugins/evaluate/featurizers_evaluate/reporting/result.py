"""`Report`: the data of a report, and the page that shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from featurizers_evaluate.reporting.data import ReportData
from featurizers_evaluate.reporting.page import write_page


@dataclass(frozen=True, repr=False)
class Report(ReportData):
    """Result of `featurizers.report`: data of each feature, which `ReportData` describes, and `save` for the page."""

    def save(self, path: str | Path) -> Path:
        """Write one HTML file, replacing it as a whole, and return its path.

        The file needs no other file and no network. It is the same in every byte for the same report.

        Raises:
            ArtefactError: the file cannot be written.
            UsageError: there are too many features for a page.
        """
        return write_page(Path(path).expanduser(), self)
