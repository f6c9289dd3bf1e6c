"""llama.cpp's compute buffers, predicted by replaying its graph and its allocator."""
