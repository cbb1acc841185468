"""Data stages, one file each: `(Dataset, Config) -> Dataset`."""
