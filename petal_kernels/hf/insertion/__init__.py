"""VL-PET, VL-Adapter and routing functions: adapters inserted after a layer's blocks."""
