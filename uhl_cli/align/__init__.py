"""Alignment: anchor texts -> word states of a host -> maps between its stream and canonical space."""
