"""Which tiles should ship? The fastest by the model that the compiler has nothing against."""
