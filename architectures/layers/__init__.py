"""The layer table: one class a layer type, which says everything about it. Imports metadata and architectures.int8."""
