"""The `ldae` command: one thin command per job, which imports what it needs when it runs, so that help is quick."""

from typing import Annotated

import typer
from typer.core import TyperGroup

from ldae_hf.recipes import RecipeError, load_recipe, tier_names
from ldae_hf.recipes.display import diff_text, show_text, tree_text


# What a user can get wrong and mend; the message is the whole answer. Anything else is a bug and shows its traceback.
USER_ERRORS = (RecipeError,)


class PlainErrors(TyperGroup):
    """Prints a user's error as one sentence and ends with exit code 2."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from error


# Help is plain text: it can be copied, and rich need not be imported for it.
PLAIN = dict(cls=PlainErrors, no_args_is_help=True, rich_markup_mode=None)
app = typer.Typer(**PLAIN, pretty_exceptions_enable=False, add_completion=False)
recipes = typer.Typer(**PLAIN)


@app.callback()
def ldae():
    """Latent denoising autoencoders (l-DAE): train them, measure them, publish them.

    \b
    ldae recipes tree                        what there is to train
    ldae recipes show l_dae --tier cpu       every value of one run
    """


@recipes.callback()
def recipes_help():
    """The paper's systems, one small recipe each, and the tiers that shrink them.

    A recipe names its parent and says what it changes. --tier shrinks any recipe to a smaller image set and machine;
    --set changes single values. The resolved recipe is saved with the weights.
    """


RecipeName = Annotated[str, typer.Argument(help="A recipe's name, or the path of your own .yaml file.")]
Tier = Annotated[
    str | None, typer.Option(help=f"Shrink the recipe: {', '.join(tier_names())}, or the path of your own .yaml file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, for example train.epochs=2; may be repeated."),
]


@recipes.command("tree")
def recipes_tree():
    """Show every recipe under its parent, with the paper's number and what the step changes."""
    typer.echo(tree_text())


@recipes.command("show")
def recipes_show(name: RecipeName, tier: Tier = None, overrides: Overrides = None):
    """Print every value of a recipe as YAML; a comment says who set what the root does not.

    \b
    ldae recipes show epochs_1600
    ldae recipes show size_b --tier cpu --set train.epochs=2
    """
    typer.echo(show_text(load_recipe(name, tier, overrides or [])))


@recipes.command("diff")
def recipes_diff(first: RecipeName, second: RecipeName, tier: Tier = None):
    """Print the values in which two recipes differ.

    \b
    ldae recipes diff l_dae size_l_epochs_1600
    ldae recipes diff random_crop size_b --tier desk
    """
    typer.echo(diff_text(load_recipe(first, tier), load_recipe(second, tier)))


app.add_typer(recipes, name="recipes")


if __name__ == "__main__":
    app()
