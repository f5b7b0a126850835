"""C that is compiled for the processor at hand, where it runs."""
