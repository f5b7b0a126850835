"""Commands for new users: a demo without downloads from a hub, and shell completion."""
