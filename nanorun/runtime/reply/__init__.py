"""What a reply may say: the thinking budget, grammars, stop strings; no engine."""
