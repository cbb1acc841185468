"""The stages of `prepare.py`, one file each: ingest > filter > crop > caption > degrade > write.

Each is a plain callable on one shard's table of samples, and a function `(Dataset, Config) -> Dataset` that lays it
over a Ray Dataset. A block is a shard from the first stage to the last, so nothing is shuffled or split.
"""
