"""Which sequence holds which tokens, and where states go that leave the device."""
