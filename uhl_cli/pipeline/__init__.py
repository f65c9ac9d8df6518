"""Pipelines: what each command does, with objects or names in and a report out; nothing here prints."""
