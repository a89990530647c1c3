"""Which arguments do commands share?"""

import argparse

from ..backends import BACKENDS


def where(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--backend``."""
    parser.add_argument("--device", help="such as cuda:1 or cpu")
    parser.add_argument("--backend", choices=BACKENDS)
