"""Aurora on BLIP: one set of shared factors for image encoder, text encoder and text decoder."""
