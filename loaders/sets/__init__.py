"""Data sets, one data set or format a file: `SETS` maps a name to a function from `Request` to `Splits`."""
