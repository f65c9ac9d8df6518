"""The transfer set: texts with a teacher's outputs."""
