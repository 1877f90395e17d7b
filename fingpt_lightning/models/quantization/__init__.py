"""8- and 4-bit layers, their rounding, and rounding that looks at the data."""
