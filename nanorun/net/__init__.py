"""Reading files elsewhere by HTTP: the Hugging Face Hub and any other server."""
