"""Recipes: each system of the paper as one small YAML file that says what it changes, and tiers that shrink them."""

from .files import RecipeError, recipe_names, sweep_members, sweep_names, tier_names
from .loader import load_recipe
from .recipe import Recipe


__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_names", "sweep_members", "sweep_names", "tier_names"]
