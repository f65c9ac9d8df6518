"""The transfer set: texts and what a teacher says of them."""
