"""Which tile sizes? A static table, from the model's rank and compile facts."""

from .table import config_for

__all__ = ["config_for"]
