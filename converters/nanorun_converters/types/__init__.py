"""Which type each tensor gets when a size is asked for: search by importance."""
