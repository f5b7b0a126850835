"""LoRA adapters: what their configuration says, the base model that they name, and what they change in its weights."""
