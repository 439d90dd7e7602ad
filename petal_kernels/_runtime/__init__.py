"""Layer 0: knows torch, knows no operator."""
