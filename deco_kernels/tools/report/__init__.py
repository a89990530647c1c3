"""What does this machine make of it? A report: is it right, fast and lean here?"""

from .runner import run

__all__ = ["run"]
