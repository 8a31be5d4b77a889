"""Data sets, one (or one format) a file: `SETS` maps a set's name to a function from `Request` to `Splits`."""
