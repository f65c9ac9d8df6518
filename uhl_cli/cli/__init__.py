"""The command line: commands parse, call a pipeline and print; nothing is decided here."""
