"""Model cards that write themselves, of what lies in a model's folder and the rows of a ledger."""

from .facts import PLANNED
from .model_card import CARD, render_card, write_card


__all__ = ["CARD", "PLANNED", "render_card", "write_card"]
