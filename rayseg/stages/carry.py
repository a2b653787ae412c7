"""Take finished tiles over from an earlier run."""

from dataclasses import dataclass
from typing import Any

from rayseg.engine.ledger import Record, Settled
from rayseg.errors import DataError
from rayseg.geo.grid import Tile
from rayseg.io import stac_write
from rayseg.io.sources import Source
from rayseg.io.written_files import WrittenFile
from rayseg.store import checksum, put, upath
from rayseg.vision.color import ClassTable


@dataclass(frozen=True)
class Carried:
    """A tile that is taken over.

    Attributes:
        tile: the tile.
        sources: its imagery, as the new run has it.
        record: its record in the earlier run.
    """

    tile: Tile
    sources: tuple[Source, ...]
    record: Record


class CarryOver:
    """`Carried -> facts`: copy a tile's files, and write its item with links from its new place.

    Args:
        earlier: prefix of the earlier run.
        root: prefix of the run.
        table: the classes.
        model: href of the model's item.
    """

    def __init__(self, earlier: str, root: str, table: ClassTable, *, model: str) -> None:
        self.earlier, self.root, self.table, self.model = earlier, root, table, model

    def __call__(self, rows: list[Carried]) -> list[Settled]:
        """Take each tile over.

        Raises:
            DataError: a file is missing or damaged.
        """
        return [self._carry(row) for row in rows]

    def _carry(self, row: Carried) -> Settled:
        name = f"{row.tile.id}.json"
        # 1. the files, the item last: a folder without an item is not a tile
        for path, (_, expected) in row.record.files.items():
            if not path.endswith(name):
                put(upath(self.root) / path, self._read(path, expected))
        # 2. the item, whose files and bands the earlier one describes
        assets = stac_write.unpacked(row.record.facts["item"])["assets"].values()
        files = [
            WrittenFile(
                asset["href"].removeprefix("./"), asset["file:size"], asset["file:checksum"], asset.get("bands", ())
            )
            for asset in assets
        ]
        folder = upath(self.root) / "tiles" / row.tile.id
        item = stac_write.write_tile_item(
            folder, row.tile, self.table, files=files, sources=row.sources, model=self.model
        )
        facts: dict[str, Any] = row.record.facts | {"item": stac_write.packed(item)}
        return Settled(row.record.status, facts=facts)

    def _read(self, path: str, expected: str) -> bytes:
        content = (upath(self.earlier) / path).read_bytes()
        if checksum(content) != expected:
            raise DataError(
                f"{self.earlier}/{path} is not what its run wrote, so the tile is not taken over; a retry maps it again"
            )
        return content
