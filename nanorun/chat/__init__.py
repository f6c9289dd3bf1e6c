"""Between messages and text: rendering prompts, parsing replies."""
