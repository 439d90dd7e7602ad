"""Layer 1: one folder per operator, the same file names every time; see CONTRIBUTING.md."""
