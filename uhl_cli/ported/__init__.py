"""A host aligned to an adapter, and the model that carries it."""
