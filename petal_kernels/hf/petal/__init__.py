"""PETAL on models with a Q-Former: mode approximation, residual, batch context, experts."""
