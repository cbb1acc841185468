"""The stages of `prepare.py`, one file each: ingest > filter > crop > caption > degrade > encode > write.

Each is a plain callable on one shard's table of samples, and a function `(Dataset, Config) -> Dataset` that lays it
over a Ray Dataset. A block is a shard from the first stage to the last, so nothing is shuffled or split.
"""

# Ray reads its environment when it is imported, and `cluster` sets it: whichever stage is imported first, before Ray.
from sr_platform import cluster as cluster
