"""Text-only language models of Llama's kind."""
