"""The parts of layers that keep a state: found when a model is opened, and called for groups of sequences."""
