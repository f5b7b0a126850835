"""What `flexgen-helm complete` reads and writes, and `flexgen-helm serve`, which answers the same bodies over HTTP.

Imports neither HELM nor torch.
"""
