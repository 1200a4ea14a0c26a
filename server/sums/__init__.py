"""The server's side of secure sums: how the members of a network give their updates to one."""
