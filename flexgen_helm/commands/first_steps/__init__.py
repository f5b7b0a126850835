"""Commands of the first minutes: the demo, and completion in a shell."""
