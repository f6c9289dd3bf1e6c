"""Domain types shared by every package; stdlib and numpy only."""
