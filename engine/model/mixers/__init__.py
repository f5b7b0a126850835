"""The modules of layers that keep a recurrent state: found when a model is opened, called for groups of sequences."""
