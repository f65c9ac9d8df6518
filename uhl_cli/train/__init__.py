"""Pretraining: batches, the model that is trained, checkpoints, the loop, and the head-only control."""
