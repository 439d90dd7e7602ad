"""Command-line tools: the demo now; bench, memory and doctor have their place in `cli.COMMANDS`."""
