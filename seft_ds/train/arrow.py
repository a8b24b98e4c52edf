"""Parquet files with Arrow types that `datasets` can't read: views of strings, and of lists."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset


def has_plain_types(file: str) -> bool:
    """Whether `datasets` reads every column of a parquet file as it is."""
    schema = pq.read_schema(file)
    return all(plain_type(kind) == kind for kind in schema.types)


def read_plain(file: str) -> Dataset:
    """The rows of a parquet file, with lists and strings in place of views and dictionaries."""
    table = pq.read_table(file)
    columns = [_plain(table.column(name)) for name in table.column_names]
    return Dataset(pa.table(columns, names=table.column_names))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that holds the same values and is known everywhere."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if _is_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, plain_type(field.type)) for field in kind])
    return kind


def _is_list(kind: pa.DataType) -> bool:
    t = pa.types
    return (
        t.is_large_list(kind)
        or t.is_list_view(kind)
        or t.is_large_list_view(kind)
        or t.is_fixed_size_list(kind)
    )


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    wanted = plain_type(column.type)
    if wanted == column.type:
        return column
    # Casts between these types are not all there (pyarrow 26); through Python every one of them works.
    return pa.chunked_array(
        [pa.array(chunk.to_pylist(), wanted) for chunk in column.chunks], wanted
    )
