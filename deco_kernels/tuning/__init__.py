"""Which tiles, and who is fastest? The tiles that ship, the cost model, and what was measured.

``table`` has the tiles of every kernel and architecture, ``call`` what is to be computed, ``chips``
what GPUs can do, ``work`` what a launch reads and multiplies, ``predict`` how long that should
take, ``cache`` how long it took here, and ``decide`` who is fastest by that.
"""

from .table import config_for

__all__ = ["config_for"]
