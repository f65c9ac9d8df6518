"""Integer codes, how they are packed, and the layout of stored parameters."""
