"""The engine: llama.cpp behind typed calls, in a process of its own.

Read in this order: `client` (what the faces call) -> `worker` (the child process) -> `engine`
(requests in, events out) -> `prefix_tree` (which sequence holds which tokens) -> `context` (one
llama.cpp context, its hazards guarded). Only this package and quant's ggml binding import
llama_cpp.
"""
