"""What is in a file: content, verification, comparison, figures; needs no torch."""
