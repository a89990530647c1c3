"""What is here? This torch, its streams, folders and compilers, and the CUDA library."""
