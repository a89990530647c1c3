"""Which tile sizes? A static table, chosen by compile facts."""

from .table import config_for

__all__ = ["config_for"]
