"""The adapter: canonical, folded for one host, and attached to it."""
