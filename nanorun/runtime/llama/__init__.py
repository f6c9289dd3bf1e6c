"""llama.cpp behind typed calls: the library, loaded weights, one context; nothing else calls it."""
