"""The published experiment: every method and baseline on the same targets, data and budget (`uhl compare`)."""
