"""What a file costs: bytes alone, or on a target."""
