"""Who runs and what is evaluated next: requests in, events out."""
