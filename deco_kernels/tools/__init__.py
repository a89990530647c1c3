"""What can I ask of it? A file or a folder a command of ``python -m deco_kernels``.

Each has ``HELP``, one line on what it does; ``arguments(parser)``, which adds its arguments; and
``main(**options)``, which gets what was given, runs, and returns the exit code. ``arguments`` and
``measure`` have what several share. Nothing of the library imports from here; and here a package
that not every command needs is imported by the function that does.
"""
