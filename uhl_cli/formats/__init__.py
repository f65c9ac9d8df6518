"""The files that uhl writes: one container, four kinds."""
