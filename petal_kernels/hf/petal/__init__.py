"""PETAL on models with a Q-Former: mode approximation, scale/shift residual, batch context."""
