"""What makes the tables and numbers of the benchmarks' pages, a module a theme; benchmarks/tables.py writes them."""
