"""The command line: a command parses, calls a function of `commands`, `inspect`, `budget` or `compare`, and prints."""
