"""The GGUF that is written: its header, its files, the journal, the pipeline."""
