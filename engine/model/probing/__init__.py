"""What a model's own forward does besides calling its layers."""
