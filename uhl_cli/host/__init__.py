"""Hosts: find a checkpoint, load it, prove where its modules are, and encode text for it.

The package itself imports nothing, so that commands that load no host need no torch.
"""
