"""What happened: tables of columns, in memory and on disk."""
