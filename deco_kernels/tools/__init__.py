"""What can I ask of it? A file or a folder a command of ``python -m deco_kernels``."""
