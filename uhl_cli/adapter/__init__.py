"""The canonical adapter: its parts, their quantisation, their bytes, and their injection into a host."""
