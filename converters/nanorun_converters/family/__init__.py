"""Files of the Nemotron family: config, tokenizer, and the metadata made of them."""
