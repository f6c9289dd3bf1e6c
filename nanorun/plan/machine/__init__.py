"""What this machine, or a described one, has: devices, memory, cores, limits."""
