"""What the commands do: options in, a report out."""
