"""The Triton source: one file a kernel, kernel first, then its launcher."""
