"""VL-PET, VL-Adapter, routing functions, mixtures of experts: adapters in a layer's places."""
