"""What comes in and goes out: private files, tables, secrets that are not shown."""
