"""What comes in and goes out: private files, tables, secrets that are not shown."""

from kvcache.io._files import (
    LARGEST,
    PARTIAL,
    check_given,
    is_folder,
    is_regular,
    make_private_file,
    make_private_folder,
    opened_regular,
    read_given,
    read_regular,
    set_aside,
    write_given,
    write_private,
)
from kvcache.io._redact import Redactor, printable, shown_url, shown_value
from kvcache.io._sizes import parse_bytes
from kvcache.io._tables import canvas, html_table, text_table

__all__ = [
    "LARGEST",
    "PARTIAL",
    "Redactor",
    "canvas",
    "check_given",
    "html_table",
    "is_folder",
    "is_regular",
    "make_private_file",
    "make_private_folder",
    "opened_regular",
    "parse_bytes",
    "printable",
    "read_given",
    "read_regular",
    "set_aside",
    "shown_url",
    "shown_value",
    "text_table",
    "write_given",
    "write_private",
]
