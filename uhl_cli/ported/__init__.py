"""A host aligned to an adapter, and the ported model: the host with the adapter."""
