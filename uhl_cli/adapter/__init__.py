"""The adapter: its canonical form, folded for one host, and attached to the host."""
