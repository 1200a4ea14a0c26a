"""Names of strategies: the mark, the table, their options, and those in people's own files."""
