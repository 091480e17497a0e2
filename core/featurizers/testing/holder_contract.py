"""`HolderContract`: tests that every way of holding a model must pass."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import ClassVar

import pytest

from featurizers.testing.held import CELLS, SITES, Cell, Held
from featurizers.testing.measuring import measure


class HolderContract:
    """Tests that edits of a held model are those of plain torch hooks. Subclass it and define `make`.

    Every cell must change the logits, or the tokens that are generated, as a plain hook does, and must leave the model
    as it was; or it must be refused by an error that says what to do instead.

    Attributes:
        title: name of the holder, for tables.
        tolerance: largest difference of logits, relative to the largest logit; of gradients ten times that.
        refused: for names of cells, in which ``*`` stands for any text, words that the error must have.
        left_out: for names of cells, the reason why the holder itself cannot do this even without an edit.

    Examples:
        class TestMyHolder(HolderContract):
            @classmethod
            def make(cls):
                model = tiny_model()
                return Held(MyHolder(model), copy.deepcopy(model), {"resid.post:1": ("model.layers.1", "output", None)})
    """

    title: ClassVar[str] = ""
    tolerance: ClassVar[float] = 1e-6
    refused: ClassVar[Mapping[str, str]] = {}
    left_out: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def make(cls) -> Held:
        """Return the holder, with a plain copy of its model."""
        raise NotImplementedError("define make, which returns the holder to test")

    @pytest.fixture(scope="class")
    @classmethod
    def held(cls) -> Held:
        """Return what `make` returns."""
        return cls.make()

    @classmethod
    def words_of_refusal(cls, cell: Cell, held: Held) -> str | None:
        """Return words of the error by which a cell must be refused; None if it must be right."""
        words = _of(cls.refused, cell)
        if words is None and cell.group == "sites" and cell.site not in held.modules:
            return cell.site.partition(":")[0]
        return words

    @classmethod
    def reason_left_out(cls, cell: Cell) -> str | None:
        """Return why the holder cannot do this even without an edit; None if it can."""
        return _of(cls.left_out, cell)

    @pytest.mark.parametrize("cell", CELLS, ids=str)
    def test_an_edit_is_that_of_a_plain_hook_or_is_refused(self, held: Held, cell: Cell) -> None:
        if reason := self.reason_left_out(cell):
            pytest.skip(reason)
        outcome = measure(held, cell)
        words = self.words_of_refusal(cell, held)
        if words is not None:
            assert outcome.refusal is not None, f"{cell} should be refused, but differs by {outcome.difference:.1e}"
            assert words in outcome.refusal, f"the error does not say {words!r}: {outcome.refusal}"
            return
        assert outcome.refusal is None, outcome.refusal
        tolerance = self.tolerance * (10 if cell.gradient else 1)
        assert outcome.difference <= tolerance, f"differs by {outcome.difference:.1e} of the largest value"
        if cell.edit != "interchange with itself":
            assert outcome.effect >= 100 * self.tolerance, "the edit changes nothing, so this proves nothing"

    def test_a_model_has_some_of_the_sites(self, held: Held) -> None:
        assert set(held.modules) & set(SITES)


def _of(texts: Mapping[str, str], cell: Cell) -> str | None:
    """Return the text for a cell's name."""
    return next((text for name, text in texts.items() if fnmatchcase(cell.name, name)), None)
