"""C functions, compiled for the processor of the machine that runs them."""
