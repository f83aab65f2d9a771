"""A run file in, one action out: `train`, `evaluate`, `export`, `check` and `bench`, each a function of one file."""
