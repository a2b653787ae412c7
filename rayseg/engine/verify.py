"""Compare the files of a run with what its steps recorded when they wrote them.

A row's record in the ledger lists the files that the row's stages wrote, `done.json` those that the step's function
wrote itself, each with size and checksum (`store.Files`).
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from upath import UPath

from rayseg.engine.ledger import WITHDRAWN, Ledger, Record
from rayseg.store import checksum, upath

Damage = dict[str, str]
"""Path of a file, relative to the run -> what is wrong with it."""
THREADS = 8


def damage_of(files: Mapping[str, Any], present: Mapping[str, int], *, root: str | None = None) -> Damage:
    """Those of some files that are missing or differ from what was written.

    Args:
        files: path relative to the run -> (bytes, checksum).
        present: path -> bytes of the files that the run has.
        root: prefix of the run, to compare checksums, too, which reads every file.
    """
    damage = {}
    for path, (size, _) in files.items():
        if path not in present:
            damage[path] = "missing"
        elif present[path] != size:
            damage[path] = f"{present[path]} bytes, {size} were written"
    if root:
        # Checksums last, and only of files of the right size: they read every byte.
        whole = [path for path in files if path not in damage]
        with ThreadPoolExecutor(THREADS) as pool:
            sums = pool.map(lambda path: checksum((upath(root) / path).read_bytes()), whole)
            for path, now in zip(whole, sums, strict=True):
                if now != files[path][1]:
                    damage[path] = "checksum differs from the one written"
    return damage


def verify_step(
    folder: UPath, present: Mapping[str, int], *, planned: int = 0, deep: bool = False, mend: bool = False
) -> tuple[Damage, int]:
    """What is damaged of the rows of a step: records that cannot be read or are missing, and files.

    The second value counts the rows with files of which the record says nothing, as earlier versions wrote them.

    Args:
        folder: of the step.
        present: path -> bytes of the files that the run has.
        planned: number of rows that had a record when the step ended.
        deep: whether to compare checksums, too.
        mend: whether to delete damaged records and withdraw those of damaged files, so that the step processes their
            rows again; only the process that runs the step may do so.
    """
    paths = map(PurePosixPath, present)
    named = {name for path in paths for name in (*path.parts[1:-1], path.stem)}
    ledger, unreadable, damage = Ledger(str(folder / "ledger")), list[UPath](), Damage()
    count = unknown = 0
    for records in ledger.latest(unreadable):
        count += len(records)
        for record in records:
            if record.status == WITHDRAWN:
                continue
            unknown += not record.files and record.id in named
            if damaged := damage_of(record.files, present, root=ledger.root if deep else None):
                damage |= damaged
                if mend:
                    reason = "; ".join(f"{path}: {why}" for path, why in damaged.items())
                    ledger.write(Record(record.id, WITHDRAWN, reason, record.attempt + 1))
    # A record that cannot be read does not name its row: the row counts as not processed.
    for path in unreadable:
        damage[f"steps/{folder.name}/ledger/{path.name}"] = "not a record"
        if mend:
            path.unlink(missing_ok=True)
    # Without its record a row is missing only if no damaged record explains it.
    if count < planned and not unreadable:
        damage[f"steps/{folder.name}/ledger"] = f"{planned - count} of {planned} records are missing"
    return damage, unknown
