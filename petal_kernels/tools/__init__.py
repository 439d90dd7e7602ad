"""Command-line tools; `cli.COMMANDS` lists them."""
