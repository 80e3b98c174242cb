"""Models from one format to another: streamed, verified, and put in place whole or not at all."""
