"""Which parts of a model are stored in how many bits, and how many bytes that makes.

``Bits`` is what ``quantization_config`` in config.json says of a packed checkpoint. The byte sizes
are those of the layouts in ``csrc/linear.h``; both the packer and ``cost.py`` take them from here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from qnext.errors import CheckpointError

METHOD = "qnext"
"""``quant_method`` of a packed checkpoint."""
FORMAT_VERSION = 1
FORMATS = ("q8", "q4")
CHOICES = (4, 8, 16)
TILE_ROWS = 32
COLUMNS = 32
"""Rows are padded to this many columns."""
GROUP = 16
"""Columns that share a scale in q4."""
BLOCK = 256
"""Columns that share a scale in q8."""
LINE = 64
"""Every matrix and every expert begins on a multiple of so many bytes."""
EXPERT_ALIGNMENT = 4096
"""On file every routed expert begins on a multiple of so many bytes: direct reads need that."""
Q4_COLUMNS_BYTES = 576
"""Bytes of 32 columns of a q4 tile."""
ROW_SCALES_BYTES = TILE_ROWS * 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Bits:
    """Bits of every part of a model; 16 keeps a part as the checkpoint has it.

    Routers, shared-expert gates, norms, convolutions, decay terms and the delta layers' small
    in_proj_ba are never packed.
    """

    experts: int = 4
    """Routed experts: nearly all weights of a sparse model."""
    shared: int = 4
    """Shared experts and dense feed-forward layers."""
    attention: int = 4
    """Projections of attention and Gated DeltaNet."""
    head: int = 4
    """The output head; of a tied model, the embedding too."""
    embedding: int = 16
    """The embedding, of which a token reads one row."""
    mtp: int = 4
    """Every matrix of the multi-token-prediction head."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value not in CHOICES:
                raise CheckpointError(
                    f"bits of {item.name}: expected one of {', '.join(map(str, CHOICES))}, "
                    f"found {value!r}."
                )

    @classmethod
    def all(cls, bits: int, **others: int) -> "Bits":
        """The same for every part but the embedding, which stays as it is; ``others`` win."""
        plain = cls(experts=bits, shared=bits, attention=bits, head=bits, mtp=bits)
        return replace(plain, **others)

    def as_config(self) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "bits": asdict(self)}

    @property
    def formats(self) -> dict[str, str | None]:
        """Format of every part; None where it is not packed."""
        return {name: format_of(bits) for name, bits in asdict(self).items()}


def read_bits(source: Mapping[str, Any], where: str = "config.json") -> Bits | None:
    """Bits of a packed checkpoint from the keys of config.json; None if it is not packed.

    Raises CheckpointError when ``quantization_config`` is of another version or damaged.
    """
    settings = source.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != METHOD:
        return None
    if settings.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: quantization_config has format_version "
            f"{settings.get('format_version')!r}; this version of qnext reads {FORMAT_VERSION}. "
            "Quantise the source again, or use the version that wrote it."
        )
    bits, names = settings.get("bits"), {item.name for item in fields(Bits)}
    if not isinstance(bits, Mapping) or set(bits) != names:
        raise CheckpointError(
            f"{where}: quantization_config.bits must give {', '.join(sorted(names))}, "
            f"found {bits!r}."
        )
    return Bits(**bits)


def format_of(bits: int) -> str | None:
    """q4 for 4, q8 for 8, None for 16."""
    return None if bits == 16 else f"q{bits}"


def stored_rows(rows: int, *, paired: bool) -> int:
    """Rows of a matrix in memory: both halves of a pair are padded, a single matrix is not."""
    return 2 * round_up(rows // 2, TILE_ROWS) if paired else rows


def tile_bytes(format: str, cols: int) -> int:
    """Bytes of 32 rows."""
    if format not in FORMATS:
        raise CheckpointError(
            f"packed format {format!r} is unknown; expected one of {', '.join(FORMATS)}."
        )
    wide = round_up(cols, COLUMNS)
    if format == "q4":
        return ROW_SCALES_BYTES + wide // COLUMNS * Q4_COLUMNS_BYTES
    return -(-wide // BLOCK) * ROW_SCALES_BYTES + wide * TILE_ROWS


def matrix_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a matrix, a multiple of 64. Raises CheckpointError for an unknown format."""
    return -(-rows // TILE_ROWS) * tile_bytes(format, cols)


def expert_bytes(format: str, width: int, hidden: int) -> tuple[int, int, int]:
    """(offset of down, bytes used, stride) of one expert of ``width`` in a stack.

    Gate and up come first, at offset 0; the stride is the bytes used, rounded up to 4,096.
    """
    down = matrix_bytes(format, stored_rows(2 * width, paired=True), hidden)
    used = down + matrix_bytes(format, hidden, width)
    return down, used, round_up(used, EXPERT_ALIGNMENT)


def round_up(n: int, multiple: int) -> int:
    """The next multiple at or above n."""
    return -(-n // multiple) * multiple
