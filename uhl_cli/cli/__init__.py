"""The command line: each command parses, calls a function of `commands`, `inspect`, `budget` or `compare`, and prints."""
