"""What a table or figure is: rows, each a recipe, the number that is measured, and what it is compared with."""

from contextlib import suppress
from dataclasses import dataclass

from ..recipes import Recipe, RecipeError, load_recipe
from .verdicts import Claim, claim_of


# What is measured -> how the table calls it. Of `distance` less is better; the rest are percent.
MEASURES = {
    "probe": "linear probe, top-1 (%)",
    "cached_probe": "linear probe on cached features, top-1 (%)",
    "distance": "Fréchet distance",
    "fine_tune": "fine-tuning, top-1 (%)",
    "depth": "linear probe after a block, top-1 (%)",
    "timesteps": "linear probe at a timestep, top-1 (%)",
    "best_noisy": "linear probe at the best timestep of noisy input, top-1 (%)",
}


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        label: what the paper calls it, unique in the table together with the measure. recipe: that is trained.
        measure: of `MEASURES`. point: of a sweep, the values that name one of its points.
        paper: the paper's number; None if it has none. against: the label of the reference, None for the reference
            itself. claim: of the row compared with its reference, where the two numbers do not say it.
    """

    label: str
    recipe: str
    measure: str = "probe"
    point: tuple[tuple[str, int | str], ...] = ()
    paper: float | None = None
    against: str | None = None
    claim: Claim | None = None


@dataclass(frozen=True)
class Experiment:
    """A table or figure; `rows` in its order, `notes` for below it."""

    name: str
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def reference(self, row: Row) -> Row | None:
        """The row that this one is compared with, of the same measure."""
        found = [one for one in self.rows if one.label == row.against and one.measure == row.measure]
        found = found or [one for one in self.rows if one.label == row.against]
        return found[0] if found else None

    def claim(self, row: Row) -> Claim | None:
        """What the paper says of the row compared with its reference."""
        reference = self.reference(row)
        if reference is None or row.claim:
            return row.claim
        return claim_of(row.paper, reference.paper)

    def in_order(self) -> list[Row]:
        """The rows in the order of their trainings: what others are compared with, then the largest effects in the
        paper, then what it has no number for."""
        references = {row.against for row in self.rows}

        def effect(row: Row) -> tuple:
            reference = self.reference(row)
            known = reference is not None and None not in (row.paper, reference.paper)
            size = -abs(row.paper - reference.paper) if known else 0
            return row.label not in references, row.against is not None, not known, size

        return sorted(self.rows, key=effect)


def latent_dims(what: Experiment, tier: str | None) -> dict[str, int]:
    """K at a tier by label, where the rows differ in it: a tier of smaller patches has a smaller K than the names."""
    dims = {}
    for row in what.rows:
        with suppress(RecipeError):  # the tier has no such model
            dims[row.label] = load_recipe(row.recipe, tier).model["latent_dim"]
    return dims if len(set(dims.values())) > 1 else {}


def not_testable(row: Row, reference: Row | None, tier: str | None) -> str | None:
    """Why a row says nothing at a tier, in a few words; None if it does."""
    recipes = []
    for one in (row, *([] if reference is None else [reference])):
        try:
            recipe = load_recipe(one.recipe, tier)
            if not recipe.is_masked:
                recipe.model_config()
        except RecipeError as error:
            return f"the tier has no {one.recipe} ({error})"
        recipes.append(recipe)
    if reference is None or (row.recipe, row.measure) == (reference.recipe, reference.measure):
        return None
    if _trained(recipes[0]) == _trained(recipes[1]) and row.measure == reference.measure:
        return f"the tier trains the same model as in {reference.label}"
    return None


def _trained(recipe: Recipe) -> dict:
    return {section: getattr(recipe, section) for section in ("model", "tokenizer", "data", "train")}
