"""Parquet files: the rows of a table, of which the columns with text and source alone are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planearly import keys
from planearly.data.documents import ANOTHER_FIELD, Problems, Unit
from planearly.data.formats import DAMAGE, damaged, open_unit
from planearly.errors import UserError, brief


def records(unit: Unit, settings: keys.Data, problems: Problems) -> Iterator[tuple[int, Any]]:
    """(row, record) of a file or part, 256 rows at a time; those that are not UTF-8 are set aside.

    Raises:
        UserError: the file is damaged, or has no column of text of that name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = unit.part.line if unit.part else 0
    groups = range(unit.part.start, unit.part.stop) if unit.part else None
    try:
        with open_unit(unit) as handle, pq.ParquetFile(handle) as table:
            columns = _columns(unit, table.schema_arrow, settings)
            for batch in table.iter_batches(256, groups, columns):
                for i in range(batch.num_rows):
                    row += 1
                    try:
                        record = {name: batch.column(name)[i].as_py() for name in columns}
                    except UnicodeDecodeError:
                        problems.set_aside(unit.path, row, "not valid UTF-8")
                        continue
                    yield row, record
    except (pa.ArrowException, *DAMAGE) as error:
        raise damaged(unit, brief(error), f"row {row}") from error


def _columns(unit: Unit, schema: Any, settings: keys.Data) -> list[str]:
    """The columns to read: the text, and the source if it is text as well."""
    import pyarrow as pa

    def readable(name: str) -> bool:
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return any(test(kind) for test in (
            pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
            pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view,
            pa.types.is_null))

    names = schema.names
    text, source = settings.text_field, unit.source_field or settings.source_field
    if text not in names:
        raise UserError(f"{unit.path} has no column '{text}' (it has {', '.join(names[:8])}); "
                        f"{ANOTHER_FIELD}")
    if names.count(text) > 1:
        raise UserError(f"{unit.path} has {names.count(text)} columns '{text}': rename all but one")
    if not readable(text):
        raise UserError(f"{unit.path}: column '{text}' holds {schema.field(text).type}, not text; "
                        f"{ANOTHER_FIELD}")
    if source not in names:
        source = source.partition(".")[0]
        also = names.count(source) == 1 and pa.types.is_struct(schema.field(source).type)
    else:
        also = source != text and names.count(source) == 1 and readable(source)
    return [text, source] if also else [text]


def row_groups(unit: Unit) -> list[tuple[int, int]]:
    """(rows, bytes) of the row groups of a Parquet file; none of one that is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_unit(unit) as handle, pq.ParquetFile(handle) as table:
            found = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            return [(group.num_rows, group.total_byte_size) for group in found]
    except (pa.ArrowException, *DAMAGE):  # told when it is read
        return []
