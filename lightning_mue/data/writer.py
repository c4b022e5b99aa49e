"""Writing WebDataset shards: whole or not at all, and equal samples give equal bytes."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_shard(shard: Path, samples: Iterable[tuple[str, str, bytes, Mapping[str, Any]]]) -> None:
    """Writes a shard aside and renames it. The tar holds no times and no owners.

    Args:
        shard: the tar.
        samples: key, the picture's ending, its bytes, its record; taken one by one, so they need not fit in memory.
    """
    aside = shard.with_name(f".{shard.name}.{os.getpid()}")
    try:
        with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, ending, picture, record in samples:
                for name, data in ((ending, picture), ("json", json.dumps(record).encode())):
                    member = tarfile.TarInfo(f"{key}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        os.replace(aside, shard)
    finally:
        aside.unlink(missing_ok=True)
